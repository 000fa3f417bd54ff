"""The banks by name and id, as last committed, so that no request reads their rows. Changed by the writer's thread."""

from collections.abc import Iterable

from memory_service.domain.errors import ServiceError
from memory_service.domain.model import Bank, metadata_bytes


class Directory:
    """Usage figures in it are of some earlier time."""

    def __init__(self, banks: Iterable[Bank]) -> None:
        self._by_name: dict[str, Bank] = {}
        self._by_id: dict[int, Bank] = {}
        # Of what the banks say of themselves, about.
        self.bytes = 0
        for bank in banks:
            self.put(bank)

    def named(self, name: str) -> Bank:
        """Errors: BANK_NOT_FOUND."""
        bank = self._by_name.get(name)
        if bank is None:
            raise bank_not_found(name)
        return bank

    def has(self, name: str) -> bool:
        """Whether there is a bank of this name."""
        return name in self._by_name

    def current(self, bank_id: int) -> Bank | None:
        """The bank as it was last changed; None when it is gone."""
        return self._by_id.get(bank_id)

    def put(self, bank: Bank) -> None:
        """A bank is new or changed."""
        if (old := self._by_id.get(bank.bank_id)) is not None:
            self.bytes -= bank_bytes(old)
        self.bytes += bank_bytes(bank)
        self._by_name[bank.name] = self._by_id[bank.bank_id] = bank

    def remove(self, bank: Bank) -> None:
        """A bank is gone."""
        self.bytes -= bank_bytes(self._by_id[bank.bank_id])
        del self._by_name[bank.name], self._by_id[bank.bank_id]

    def all(self) -> list[Bank]:
        """Every bank."""
        return list(self._by_id.values())


def bank_bytes(bank: Bank) -> int:
    """What a bank says of itself takes so much memory, about."""
    words = metadata_bytes(bank.metadata) + metadata_bytes(bank.kv.reader_parts)
    return len(bank.name) + words + 8 * len(bank.kv.layers)


def bank_not_found(name: str) -> ServiceError:
    """BANK_NOT_FOUND."""
    return ServiceError("BANK_NOT_FOUND", f"there is no bank {name!r}", bank=name)


def not_mounted(name: str) -> ServiceError:
    """STORAGE_ERROR: the folder of a bank's payloads is not the one that was made for them."""
    text = f"the payloads of bank {name} are not there; is a disk not mounted?"
    return ServiceError("STORAGE_ERROR", text, errno="ENOENT")
