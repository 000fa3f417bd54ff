"""How full the banks are that have a capacity, as the last write saw it. This says when a ledger is loaded and when a
bank is brought down; what a write goes by is in the records."""

from memory_service.domain.model import Bank

# From this part of the capacity on, the ledger is loaded.
_NEAR = 0.8


class Measured:
    """Holds the usage of banks in the unit of their capacity, by bank id. The writer's thread changes it."""

    def __init__(self) -> None:
        self.used: dict[int, int] = {}

    def near(self, bank: Bank) -> bool:
        """Tell whether an eviction may be needed soon."""
        return bank.capacity is not None and self.used.get(bank.bank_id, 0) > _NEAR * bank.capacity.limit

    def too_full(self, bank: Bank) -> bool:
        """Tell whether a bank holds more than its capacity, which was lowered, and the policy may evict."""
        if bank.capacity is None or bank.policy.kind == "reject":
            return False
        return self.used.get(bank.bank_id, 0) > bank.capacity.limit

    def add(self, bank_id: int, size: int) -> None:
        """Count what has come to a bank, or with a negative size has gone."""
        self.used[bank_id] = self.used.get(bank_id, 0) + size
