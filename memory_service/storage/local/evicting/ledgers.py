"""The ledgers of banks that may have to evict soon. This file owns how a ledger is read while the writer goes on: from
a snapshot, with the changes entered that were made since.

A change is entered as the last step of the operation that makes it. An operation that fails has entered nothing then;
when a whole transaction fails, all ledgers are dropped and read anew.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from memory_service.storage.base import Retrievals
from memory_service.storage.local.evicting.ledger import Ledger


@dataclass
class Loading:
    """A ledger that is being read, with the changes that were made since its snapshot."""

    bank_id: int
    changes: list[Callable[[Ledger], None]] = field(default_factory=list)
    # The snapshot is no longer a state from which the changes lead to the present.
    broken: bool = False


class Ledgers:
    """Holds the ledgers by bank. The writer's thread alone uses it, except `ready` and `evicting`."""

    def __init__(self) -> None:
        self._ready: dict[int, Ledger] = {}
        self._loading: dict[int, Loading] = {}

    def ready(self, bank_id: int) -> bool:
        """Tell whether the bank's ledger is at hand."""
        return bank_id in self._ready

    def evicting(self, bank_id: int) -> bool:
        """Tell whether an eviction of the bank is under way, as far as its ledger is at hand. Any thread may ask."""
        ledger = self._ready.get(bank_id)
        return ledger is not None and len(ledger.doomed) > 0

    def __len__(self) -> int:
        return len(self._ready)

    def get(self, bank_id: int) -> Ledger | None:
        """Return the ledger of a bank, if it is at hand."""
        return self._ready.get(bank_id)

    def put(self, bank_id: int, ledger: Ledger) -> None:
        """Keep a ledger that equals the rows."""
        self._ready[bank_id] = ledger

    def begin(self, bank_id: int) -> Loading:
        """Begin to keep the changes that a ledger lacks, which is read from a snapshot that is being opened."""
        loading = self._loading[bank_id] = Loading(bank_id)
        return loading

    def finish(self, loading: Loading, ledger: Ledger) -> bool:
        """Bring a ledger that was read from the snapshot up to date; return False when it must be read again."""
        if self._loading.get(loading.bank_id) is loading:
            del self._loading[loading.bank_id]
        if loading.broken:
            return False
        if not self.ready(loading.bank_id):
            for change in loading.changes:
                change(ledger)
            self.put(loading.bank_id, ledger)
        return True

    def change(self, bank_id: int, change: Callable[[Ledger], None]) -> None:
        """Enter a change in the ledger of a bank; this is the last step of the operation that made it."""
        if (ledger := self._ready.get(bank_id)) is not None:
            change(ledger)
        if (loading := self._loading.get(bank_id)) is not None:
            loading.changes.append(change)

    def counted(self, counts: Mapping[int, Retrievals]) -> None:
        """Enter retrievals by chunk id, of any banks."""
        if not self._ready and not self._loading:
            return
        ids = np.fromiter(counts, np.int64, len(counts))
        retrievals, used = np.array([(some.times, some.last) for some in counts.values()], np.int64).T
        for bank_id in {*self._ready, *self._loading}:
            self.change(bank_id, lambda ledger: ledger.count(ids, retrievals, used))

    def drop(self, bank_id: int) -> None:
        """Drop the ledger of a bank that is gone, or is measured in another unit."""
        self._forget([bank_id])

    def forget_all(self) -> None:
        """Drop all ledgers, because a transaction failed whose changes they may have."""
        self._forget(list({*self._ready, *self._loading}))

    def _forget(self, bank_ids: Iterable[int]) -> None:
        for bank_id in bank_ids:
            self._ready.pop(bank_id, None)
            if bank_id in self._loading:
                self._loading[bank_id].broken = True
