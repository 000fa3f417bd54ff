"""How chunks leave a bank: deletion, eviction and expiry share it. This file owns the order: rows in the transaction,
then what follows the store, then the objects."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection

from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank, EvictionReason
from memory_service.observe.metrics import Metrics
from memory_service.storage.background import Janitor
from memory_service.storage.base import Objects
from memory_service.storage.chunks.removed import Removed
from memory_service.storage.postgres import changing as changes
from memory_service.storage.postgres.changing import Changing
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.rows import bank_rows, gone_rows
from memory_service.storage.postgres.rows.change_rows import Changed


@dataclass(frozen=True, slots=True)
class Removal:
    """Removes chunks and banks. Any thread may call it.

    now: the time of the store.
    """

    database: Database
    feed: Feed
    objects: Objects
    janitor: Janitor
    metrics: Metrics
    limits: Limits
    pauses: Pauses
    now: Callable[[], int]

    def remove(
        self,
        bank: Bank,
        chunk_ids: Sequence[int],
        counter: str,
        *,
        before: Callable[[Connection], None] = lambda _: None,
        keep_objects: bool = False,
    ) -> list[int]:
        """Remove chunks in one transaction, count them in `counter` of the bank (chunks_deleted, ...), and return the
        ids that existed. before: what is done first in the same transaction."""
        now = self.now()

        def operation(connection: Connection) -> tuple[Changing, Changed | None, Removed] | None:
            changing = changes.begin(connection, bank)
            if changing is None:
                return None
            self.feed.begins(changing)
            before(connection)
            removed = gone_rows.remove(connection, bank.bank_id, chunk_ids, now)
            changing.removed(removed, counter)
            return changing, changing.write(now), removed

        if (done := self.database.of(bank.tenant).change(operation)) is None:
            return []
        changing, changed, removed = done
        self.feed.committed(changing, changed)
        self.went(bank, removed, counter, keep_objects=keep_objects)
        return removed.ids

    def went(self, bank: Bank, removed: Removed, counter: str, *, keep_objects: bool = False) -> None:
        """Learn that chunks were removed and that followers know it: count them, and remove their objects."""
        if not removed.ids:
            return
        self.metrics.gone[counter].inc(len(removed.ids))
        self.metrics.recorder.gone(bank.title, removed.ids, counter.removeprefix("chunks_"))
        if not keep_objects:
            self._delete(bank, removed.ids)

    def evicted(self, bank: Bank, chunk_ids: Sequence[int], reasons: Mapping[EvictionReason, int]) -> None:
        """Learn that chunks were evicted and that followers know it."""
        if chunk_ids:
            for reason, count in reasons.items():
                self.metrics.chunks_evicted.labels(reason).inc(count)
            self.metrics.recorder.gone(bank.title, chunk_ids, "evicted")
            self._delete(bank, chunk_ids)

    def _delete(self, bank: Bank, chunk_ids: Sequence[int]) -> None:
        if bank.kv.layers:
            self.janitor.later(self.objects.delete, bank.uid, list(chunk_ids))

    def bank_deleted(self, bank: Bank) -> None:
        """Remove what a deleted bank held, bit by bit, also by another service or after a restart."""
        self.metrics.recorder.dropped(bank.title)
        self.feed.dropped(bank)
        self.janitor.later(self._clear_some, bank.bank_id, bank.uid)

    def _clear_some(self, bank_id: int, uid: str) -> None:
        """Take a step of the clearing of a bank; the next one comes after what other tasks wait for."""
        if not self.pauses.leaves_out("clearing") and self._clear_step(bank_id, uid):
            self.janitor.later(self._clear_some, bank_id, uid)

    def clear(self, bank_id: int, uid: str, go_on: Callable[[], bool] = lambda: True) -> None:
        """Remove the rows of a deleted bank in steps, and the objects of each step after its rows. go_on: asked before
        each step."""
        if not self.pauses.leaves_out("clearing"):
            while go_on() and self._clear_step(bank_id, uid):
                pass

    def _clear_step(self, bank_id: int, uid: str) -> bool:
        """Remove some rows of a deleted bank, and their objects; return whether there may be more."""
        step = partial(gone_rows.clear_bank, bank_id=bank_id, most=self.limits.step_rows)
        chunk_ids = self.database.change(step)
        self.pauses.reach("clearing step")
        if chunk_ids:
            self.objects.delete(uid, chunk_ids)
        return chunk_ids is not None

    def clear_all(self, go_on: Callable[[], bool] = lambda: True) -> None:
        """Go on with deleted banks of which something is left. go_on: asked before each step."""
        with self.database.read() as connection:
            gone = bank_rows.gone(connection)
        for bank_id, uid in gone:
            self.clear(bank_id, uid, go_on)
