"""How chunks leave a bank: deletion, eviction and expiry share it. This file owns the order: rows and ledger in the
transaction, then what follows the records, then the files."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from sqlalchemy import Connection

from memory_service.domain.errors import ServiceError
from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank, EvictionReason
from memory_service.observe.metrics import Metrics
from memory_service.storage.background import Janitor
from memory_service.storage.chunks.removed import Removed
from memory_service.storage.followers import Followers
from memory_service.storage.local import quarantine
from memory_service.storage.local.evicting.ledgers import Ledgers
from memory_service.storage.local.files.objects import LocalObjects
from memory_service.storage.local.records import bank_rows, gone_rows
from memory_service.storage.local.records.records import Records


class Removal:
    """Removes chunks and banks. Any thread may call it, except where it is said."""

    def __init__(
        self,
        records: Records,
        ledgers: Ledgers,
        payloads: LocalObjects,
        followers: Followers,
        janitor: Janitor,
        metrics: Metrics,
        limits: Limits,
        pauses: Pauses,
    ) -> None:
        self._records = records
        self._ledgers = ledgers
        self._payloads = payloads
        self._followers = followers
        self._janitor = janitor
        self._metrics = metrics
        self._limits = limits
        self._pauses = pauses
        # By bank id: what resolves when nothing is left of a deleted bank. The writer's thread adds to it.
        self._clearing: dict[int, Future[None]] = {}

    def remove(
        self, bank: Bank, chunk_ids: Sequence[int], counter: str, *, keep_files: bool = False
    ) -> "Future[list[int]]":
        """Remove chunks, count them in `counter` of the bank (chunks_deleted, ...), and return the ids that existed."""

        def operation(connection: Connection) -> list[int]:
            gone = gone_rows.remove(connection, bank.bank_id, chunk_ids, counter, self._records.clock.now_us()).ids
            self._ledgers.change(bank.bank_id, lambda ledger: ledger.remove(gone))
            return gone

        def applied(gone: list[int]) -> None:
            self._metrics.gone[counter].inc(len(gone))
            self._metrics.recorder.gone(bank.title, gone, counter.removeprefix("chunks_"))
            self._followers.removed(bank, gone)
            if not keep_files:
                self._unlink(bank, gone)

        return self._records.writer.submit(operation, applied, tenant=bank.tenant)

    def forget(
        self,
        bank: Bank,
        chunk_ids: Sequence[int],
        count: Callable[[Connection, Removed, Mapping[int, str | None]], None],
    ) -> "Future[list[int]]":
        """Remove chunks with their keys, and return the ids that existed; their files are left to the caller. count: is
        told in the same transaction what goes, and the descriptors of the payloads."""

        def operation(connection: Connection) -> list[int]:
            removed, payloads = gone_rows.forget(connection, bank.bank_id, chunk_ids)
            count(connection, removed, payloads)
            self._ledgers.change(bank.bank_id, lambda ledger: ledger.remove(removed.ids))
            return removed.ids

        def applied(gone: list[int]) -> None:
            self._metrics.gone["chunks_deleted"].inc(len(gone))
            self._metrics.recorder.gone(bank.title, gone, "deleted")
            self._followers.removed(bank, gone)

        return self._records.writer.submit(operation, applied, tenant=bank.tenant, durable=True)

    def evicted(self, bank: Bank, chunk_ids: Sequence[int], reasons: Mapping[EvictionReason, int]) -> None:
        """Remove what belongs to evicted chunks. The writer's thread calls this after the commit that removed their
        rows."""
        if chunk_ids:
            for reason, count in reasons.items():
                self._metrics.chunks_evicted.labels(reason).inc(count)
            self._metrics.recorder.gone(bank.title, chunk_ids, "evicted")
            self._followers.removed(bank, chunk_ids)
            self._unlink(bank, chunk_ids)

    def _unlink(self, bank: Bank, chunk_ids: Sequence[int]) -> None:
        if bank.kv.layers:
            self._janitor.later(self._payloads.delete, bank.uid, chunk_ids)

    def expire(self, bank: Bank, chunk_ids: Sequence[int]) -> None:
        """Remove chunks that have expired: the followers do without them at once, and their rows go in steps. Blocks
        until all are gone."""
        self._records.writer.between(lambda: self._followers.removed(bank, chunk_ids)).result()
        step = self._limits.step_rows
        for begin in range(0, len(chunk_ids), step):
            self.remove(bank, chunk_ids[begin : begin + step], "chunks_expired").result()

    def bank_deleted(self, bank: Bank) -> None:
        """Remove what a deleted bank held, bit by bit, also after a restart. The writer's thread calls this after the
        commit that took the bank's row."""
        self._metrics.recorder.dropped(bank.title)
        self._followers.dropped(bank)
        self._janitor.later(self._drop_files, bank.uid)
        self.clear(bank.bank_id, bank.uid, bank.tenant)

    def _drop_files(self, uid: str) -> bool:
        """Remove the payloads of a deleted bank and what quarantine has of it, and return whether none is left."""
        self._pauses.reach("files dropped")
        return self._payloads.folders.drop(uid) and quarantine.drop(self._payloads.data, uid)

    def clearings(self) -> "list[Future[None]]":
        """Return what resolves when nothing is left of the deleted banks that are being cleared; see `cleared`."""
        return list(self._clearing.values())

    def cleared(self, bank_id: int, uid: str) -> "Future[None]":
        """Return what resolves when nothing is left of a deleted bank, neither rows nor files; what could not be
        removed before is tried again. Errors, by the future: STORAGE_ERROR where its files cannot be reached, and those
        of the database."""
        if (under_way := self._clearing.get(bank_id)) is not None:
            return under_way
        with self._records.read(to_the_end=True) as connection:
            left = bank_id in dict(bank_rows.gone(connection))
        clearing: Future[None] = Future()
        if left:
            self._clearing[bank_id] = clearing
            self.clear(bank_id, uid)
        else:
            clearing.set_result(None)
        return clearing

    def clear(self, bank_id: int, uid: str, tenant: str = "") -> None:
        """Remove the rows of a deleted bank, in transactions of their own between those of others; then what is left of
        its files, and last the row that says that it is being deleted, by which its files are known as such."""
        if self._pauses.leaves_out("clearing"):
            return
        self._clearing.setdefault(bank_id, Future())

        def applied(done: bool) -> None:
            if done:
                self._janitor.later(self._finish, bank_id, uid)
            else:
                self.clear(bank_id, uid, tenant)

        step = partial(gone_rows.clear_bank, bank_id=bank_id, most=self._limits.step_rows)
        cleared = self._records.writer.submit(step, applied, tenant=tenant)
        cleared.add_done_callback(lambda step: self._settle(bank_id, step.exception()) if step.exception() else None)

    def _finish(self, bank_id: int, uid: str) -> None:
        if not self._drop_files(uid):
            text = "the files of a deleted bank are not there, or cannot be removed; is a disk not mounted?"
            self._settle(bank_id, ServiceError("STORAGE_ERROR", text, errno="ENOENT"))
            return
        forgotten = self._records.writer.submit(partial(gone_rows.forget_bank, bank_id=bank_id))
        forgotten.add_done_callback(lambda step: self._settle(bank_id, step.exception()))

    def _settle(self, bank_id: int, error: BaseException | None) -> None:
        """Tell those who wait for the end of a deleted bank how it went."""
        if (clearing := self._clearing.pop(bank_id, None)) is None:
            return
        if error is None:
            clearing.set_result(None)
        else:
            clearing.set_exception(error)
