"""Evictions of large banks are planned beside the writer, from a copy of the ledger. This file owns that no write goes
by a plan that was made for something else: for another capacity or policy, or for chunks that have gone meanwhile."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memory_service.domain.chunk_size import size_of
from memory_service.domain.eviction import NOBODY, Victims, overflows, plan
from memory_service.domain.model import Chunk
from memory_service.storage.local.evicting.ledger import Ledger
from memory_service.storage.local.evicting.ledgers import Ledgers
from memory_service.storage.local.known_banks import KnownBanks
from memory_service.storage.local.records import bank_rows
from memory_service.storage.local.records.records import Records


class Planned(NamedTuple):
    """The victims of an eviction, and the ledger from a copy of which they were chosen; None stands for a plan that was
    not made."""

    victims: Victims = NOBODY
    ledger: Ledger | None = None

    def holds(self, ledger: Ledger) -> bool:
        """Tell whether a ledger is the one of the plan, by which nothing has gone yet: another capacity or policy, and
        a transaction that failed, come with another ledger."""
        return ledger is self.ledger and (not self.victims or ledger.has(int(self.victims.ids[0])))


UNPLANNED = Planned()


class Planning:
    """One plan beside the writer: `begin` runs between two of its transactions, `planned` while it goes on."""

    def __init__(
        self, records: Records, known: KnownBanks, ledgers: Ledgers, bank_id: int, chunk: Chunk | None
    ) -> None:
        """Plan for a chunk that needs room; without one, for what a bank holds beyond its capacity."""
        self._records, self._known, self._ledgers = records, known, ledgers
        self._bank_id, self._chunk = bank_id, chunk

    def begin(self, room: NDArray[np.int64]) -> bool:
        """Copy the ledger into `room`, and return whether there is something to plan: another write may have brought a
        plan meanwhile, or something else room. Errors: TOO_LARGE."""
        ledger, bank = self._ledgers.get(self._bank_id), self._known.current(self._bank_id)
        if ledger is None or ledger.doomed or bank is None or bank.capacity is None:
            return False
        with self._records.read(to_the_end=True) as connection:
            usage = bank_rows.usage(connection, self._bank_id)
        self._capacity, self._policy = bank.capacity, bank.policy
        self._used = 0 if usage is None else int(getattr(usage, bank.capacity.unit))
        self._need = 0 if self._chunk is None else size_of(self._chunk, bank.capacity.unit)
        if not overflows(self._capacity, self._used, self._need):
            return False
        self._ledger, self._copy = ledger, ledger.copied(room)
        return True

    def planned(self) -> Planned:
        """Plan from the copy. Errors: BANK_FULL."""
        candidates, partly = self._copy.candidates(), self._chunk is None
        victims = plan(candidates, self._capacity, self._policy, self._used, self._need, partly=partly)
        return Planned(victims, self._ledger)
