"""What an engine does with chunks that are forgotten."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from memory_service.domain.model import Bank, Filter
from memory_service.storage.forgetting.noted import Noted
from memory_service.storage.forgetting.parts import Forgotten


class ChunkForgetting(Protocol):
    """Forgets chunks of banks, and what is left of them beside rows. A step that a kill has cut off can be done
    again."""

    def alone(self, check_resting: Callable[[], None]) -> AbstractContextManager[object]:
        """Keep other services from forgetting in the same store during the block. check_resting: raises where this
        service is to end."""

    def bank(self, bank_id: int) -> Bank | None:
        """Return a bank by its id; None where it is gone."""

    def named_bank(self, tenant: str, name: str) -> Bank | None:
        """Return a bank of a tenant; None where there is none."""

    def check(self, bank: Bank) -> None:
        """Refuse to forget chunks whose objects cannot be reached. Errors: STORAGE_ERROR."""

    def matching(self, bank: Bank, where: Filter) -> list[int]:
        """Find the chunks of a bank that a filter lets pass, also evicted ones of which the log tells, and those that
        were taken out of service; of these also what cannot be read. Errors: FlawedError."""

    def parts(self, noted: Noted, bank: Bank, forgotten: Forgotten) -> None:
        """Forget the chunks of a bank that are of forgotten parts of branches, or had attended to them."""

    def in_deleted_banks(self, noted: Noted, forgotten: Forgotten) -> None:
        """Forget what is kept aside of such chunks of banks that were deleted before."""

    def named(self, noted: Noted, bank: Bank, ids: Sequence[int]) -> None:
        """Forget chunks of a bank by their ids, those that are gone already too."""

    def drop(self, noted: Noted, bank_id: int, uid: str) -> None:
        """Forget a bank with all that it has; it may be deleted already. Errors: STORAGE_ERROR."""

    def settle(self, check_resting: Callable[[], None]) -> None:
        """Return when what is gone already is in its place. check_resting: raises where this is to end."""

    def clear(self, noted: Noted) -> None:
        """Forget what clients and other tasks have left of any chunk."""

    def clean(self) -> None:
        """Clear what the database keeps of rows that are gone. Errors: NOT_SERVING, where somebody keeps that."""
