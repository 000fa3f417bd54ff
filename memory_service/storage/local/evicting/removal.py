"""How chunks leave a bank. Owns the order: rows and ledger in the transaction, then the index, then the files."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from sqlalchemy import Connection

from memory_service.domain.model import Bank, EvictionReason
from memory_service.observe.metrics import Metrics
from memory_service.storage.background import Janitor
from memory_service.storage.local.files.objects import Payloads
from memory_service.storage.local.followers import Followers
from memory_service.storage.local.records import gone_rows
from memory_service.storage.local.records.records import Records

# Rows that one operation removes, so that nobody waits long for the writer.
STEP = 250


class Removal:
    """Removes chunks and banks; deletion, eviction and expiry share it."""

    def __init__(
        self, store: Records, payloads: Payloads, followers: Followers, janitor: Janitor, metrics: Metrics
    ) -> None:
        self._records = store
        self._payloads = payloads
        self._followers = followers
        self._janitor = janitor
        self._metrics = metrics

    def remove(
        self, bank: Bank, chunk_ids: Sequence[int], counter: str, *, keep_files: bool = False
    ) -> "Future[list[int]]":
        """Remove chunks, count them in `counter` of the bank (chunks_deleted, ...), and return the ids that existed."""

        def operation(connection: Connection) -> list[int]:
            gone = gone_rows.remove(connection, bank.bank_id, chunk_ids, counter, self._records.clock.now_us()).ids
            self._records.ledgers.change(bank.bank_id, lambda ledger: ledger.remove(gone))
            return gone

        def applied(gone: list[int]) -> None:
            self._metrics.gone[counter].inc(len(gone))
            self._followers.removed(bank, gone)
            if not keep_files:
                self._unlink(bank, gone)

        return self._records.writer.submit(operation, applied)

    def evicted(self, bank: Bank, chunk_ids: Sequence[int], reasons: Mapping[EvictionReason, int]) -> None:
        """Remove index entries and files of evicted chunks; this is called after the commit that removed their rows."""
        if chunk_ids:
            for reason, count in reasons.items():
                self._metrics.chunks_evicted.labels(reason).inc(count)
            self._followers.removed(bank, chunk_ids)
            self._unlink(bank, chunk_ids)

    def _unlink(self, bank: Bank, chunk_ids: Sequence[int]) -> None:
        if bank.kv.layers:
            self._janitor.later(self._payloads.unlink, bank.uid, chunk_ids)

    def hide(self, bank: Bank, chunk_ids: Sequence[int]) -> None:
        """Take chunks out of the index, before their rows go."""
        self._records.writer.between(lambda: self._followers.removed(bank, chunk_ids)).result()

    def bank_deleted(self, bank: Bank) -> None:
        """Remove what a deleted bank held, bit by bit, also after a restart. This is called after the commit that took
        the bank's row."""
        self._followers.dropped(bank)
        self._janitor.later(self._payloads.drop_bank, bank.uid)
        self.clear(bank.bank_id, bank.uid)

    def clear(self, bank_id: int, uid: str) -> None:
        """Remove the rows of a deleted bank, in transactions of their own between those of others; then what is left of
        its files, and last the row that says that it is being deleted, by which its files are known as such."""

        def applied(done: bool) -> None:
            if done:
                self._janitor.later(self._finish, bank_id, uid)
            else:
                self.clear(bank_id, uid)

        step = partial(gone_rows.clear_bank, bank_id=bank_id, most=STEP)
        self._records.writer.submit(step, applied)

    def _finish(self, bank_id: int, uid: str) -> None:
        if self._payloads.drop_bank(uid):
            self._records.writer.submit(partial(gone_rows.forget_bank, bank_id=bank_id))
