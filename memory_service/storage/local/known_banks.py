"""The banks by tenant and name, and by id, as they were last committed, so that no request reads their rows. The
writer's thread changes them, and any thread reads them."""

from collections.abc import Iterable

from memory_service.domain.errors import bank_not_found
from memory_service.domain.model import Bank, bank_bytes


class KnownBanks:
    """Keeps every bank in memory; usage figures in them are of some earlier time."""

    def __init__(self, banks: Iterable[Bank]) -> None:
        """Begin with the banks that the records have."""
        self._by_name: dict[tuple[str, str], Bank] = {}
        self._by_id: dict[int, Bank] = {}
        # An estimate of what specs and metadata of all banks take.
        self.bytes = 0
        for bank in banks:
            self.put(bank)

    def named(self, tenant: str, name: str) -> Bank:
        """Return the bank of this tenant and name. Errors: BANK_NOT_FOUND."""
        bank = self._by_name.get((tenant, name))
        if bank is None:
            raise bank_not_found(name)
        return bank

    def current(self, bank_id: int) -> Bank | None:
        """Return the bank as it was last changed; None when it is gone."""
        return self._by_id.get(bank_id)

    def put(self, bank: Bank) -> None:
        """Note that a bank is new or changed. One whose name it takes was removed before."""
        if (old := self._by_id.get(bank.bank_id)) is not None:
            self.bytes -= bank_bytes(old)
            del self._by_name[old.tenant, old.name]  # it may have another name by now
        self.bytes += bank_bytes(bank)
        self._by_name[bank.tenant, bank.name] = self._by_id[bank.bank_id] = bank

    def remove(self, bank: Bank) -> None:
        """Note that a bank is gone."""
        self.bytes -= bank_bytes(self._by_id[bank.bank_id])
        del self._by_name[bank.tenant, bank.name], self._by_id[bank.bank_id]

    def all(self) -> list[Bank]:
        """Return every bank that is not deleted."""
        return list(self._by_id.values())
