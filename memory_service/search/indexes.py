"""The indexes of all banks: loaded on first use, kept in step with the records, cared for, put to rest. Owns that an
index equals the records: it is loaded from a snapshot of them and learns what was committed meanwhile before anyone
sees it; one that misses a change is dropped."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from sqlalchemy import Connection

from memory_service.domain import cancellation
from memory_service.domain.errors import bank_not_found
from memory_service.domain.model import Bank, IndexStats
from memory_service.search.index import BankIndex, Vectors
from memory_service.search.ivf import Ivf, Stopped
from memory_service.search.loading import load
from memory_service.search.snapshots import Snapshots, drop_unknown
from memory_service.search.upkeep import Upkeep
from memory_service.settings import Settings
from memory_service.storage.local.records import bank_rows, chunk_rows
from memory_service.storage.local.records.records import Records

# Rows of a tail that are read from the records as fast as from a file.
_FEW = 512
# Who waits for another to load an index looks so often whether his caller is still there, in seconds.
_LOOK_S = 0.1
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Entry:
    """A bank's index with its care; while it is loaded (None), the changes that it has to learn."""

    bank: Bank
    upkeep: Upkeep | None = None
    changes: list[Callable[[BankIndex], object]] = field(default_factory=list)
    used: float = 0.0


class SearchIndexes:
    """`added`, `removed`, `changed`, `dropped` are called by the writer's thread in the order of commits, the rest by
    any thread."""

    def __init__(self, source: Records, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, for what is idle."""
        self._records = source
        self._settings = settings
        self._clock = clock
        self._entries: dict[int, _Entry] = {}
        self._loading: dict[int, threading.Lock] = {}
        self._dropped: list[Snapshots] = []
        self._stopping = threading.Event()
        self._work = threading.Event()
        self._thread = threading.Thread(target=self._care, name="kvbank-index", daemon=True)
        self._thread.start()

    def get(self, bank: Bank) -> BankIndex:
        """The bank's index, loaded if it is not in memory. Not for a caller that holds a read connection: there are
        only so many. Errors: BANK_NOT_FOUND, Cancelled."""
        entry = self._entries.get(bank.bank_id)
        upkeep = entry.upkeep if entry else None
        if entry is None or upkeep is None:
            entry, upkeep = self._loaded(bank)
        entry.used = self._clock()
        return upkeep.index

    def stats(self, bank: Bank) -> IndexStats:
        """As it is now."""
        entry = self._entries.get(bank.bank_id)
        if entry is None or entry.upkeep is None:
            return IndexStats()
        segments = entry.upkeep.index.segments
        lists = [segment for segment in segments if isinstance(segment, Ivf)]
        return IndexStats(
            kind="ivf" if lists else "exact",
            loaded=True,
            vectors=sum(segment.rows for segment in segments),
            tombstones=sum(segment.dead for segment in segments),
            segments=sum(segment.rows > 0 for segment in segments),
            memory_bytes=sum(segment.memory for segment in segments),
            recall=lists[0].recall if lists else None,
        )

    def close(self) -> None:
        """Snapshot what is in no file. When nothing searches or changes any more."""
        self._stopping.set()
        self._work.set()
        self._thread.join()
        for entry in self._entries.values():
            if entry.upkeep is not None:
                self._save_tail(entry.upkeep)

    # Changes

    def added(self, bank: Bank, ids: Sequence[int], vectors: Vectors) -> None:
        """Chunks were committed: [n] and [n, d]."""
        new = np.array(ids, np.int64)
        self._change(bank, lambda index: index.add(new, vectors))

    def removed(self, bank: Bank, ids: Sequence[int]) -> None:
        """Chunks are gone; ids that are not there are fine."""
        gone = np.array(ids, np.int64)
        self._change(bank, lambda index: index.remove(gone))

    def changed(self, bank: Bank) -> None:
        """The bank wants another kind of index."""
        if (entry := self._entries.get(bank.bank_id)) is None:
            return
        entry.bank = bank
        if entry.upkeep is not None:
            entry.upkeep.kind = bank.index
            self._work.set()

    def dropped(self, bank: Bank) -> None:
        """The bank is gone."""
        self._entries.pop(bank.bank_id, None)
        self._loading.pop(bank.bank_id, None)
        self._dropped.append(self._snapshots(bank))
        self._work.set()

    def _change(self, bank: Bank, change: Callable[[BankIndex], bool]) -> None:
        entry = self._entries.get(bank.bank_id)
        if entry is None:
            return
        if entry.upkeep is None:
            entry.changes.append(change)
            return
        try:
            if change(entry.upkeep.index):
                self._work.set()
        except Exception:
            # It would be wrong for good; the next search loads it anew. What else follows the commit is done.
            _log.exception("the index of bank %s misses a change and is dropped", bank.name)
            self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.bank.bank_id) is entry:
            self._entries.pop(entry.bank.bank_id, None)

    # Loading

    def _loaded(self, bank: Bank) -> tuple[_Entry, Upkeep]:
        loading = self._loading.setdefault(bank.bank_id, threading.Lock())
        while not loading.acquire(timeout=_LOOK_S):
            cancellation.check()
        try:
            entry = self._entries.get(bank.bank_id)
            if entry is not None and entry.upkeep is not None:
                return entry, entry.upkeep
            return self._load(bank)
        finally:
            loading.release()

    def _load(self, bank: Bank) -> tuple[_Entry, Upkeep]:
        """On the caller's thread; the writer's one only begins and ends it."""
        entry, snapshots = _Entry(bank, used=self._clock()), self._snapshots(bank)

        def begin() -> Connection:
            connection = self._records.snapshot()
            self._entries[bank.bank_id] = entry
            return connection

        def publish(index: BankIndex) -> Upkeep:
            for change in entry.changes:
                change(index)
            entry.changes.clear()
            entry.upkeep = Upkeep(index, entry.bank.index, self._settings.ivf_from, snapshots, self._stopping.is_set)
            return entry.upkeep

        writer, started = self._records.writer, time.perf_counter()
        try:
            with writer.between(begin).result() as connection:
                if bank_rows.usage(connection, bank.bank_id) is None:
                    # Deleted since it was looked up: nobody would drop it again.
                    self._loading.pop(bank.bank_id, None)
                    raise bank_not_found(bank.name)
                ids = chunk_rows.ids(connection, bank.bank_id)
                index = load(ids, partial(chunk_rows.vectors, connection, bank), snapshots)
            upkeep = writer.between(partial(publish, index)).result()
        except BaseException:
            self._forget(entry)
            raise
        _log.info("index of bank %s: %d vectors in %.3f s", bank.name, len(index), time.perf_counter() - started)
        self._work.set()
        return entry, upkeep

    def _snapshots(self, bank: Bank) -> Snapshots:
        return Snapshots(
            folder=self._settings.data / "indexes" / bank.uid,
            store_id=self._records.store_id,
            dimension=bank.embedding.dimension,
            min_free=self._settings.min_free,
            durable=self._settings.durability == "fsync",
        )

    # Care, in a thread of its own

    def _care(self) -> None:
        self._guarded(self._drop_unknown)
        while not self._stopping.is_set():
            self._work.wait(min(60.0, self._settings.index_idle / 4))
            self._work.clear()
            while self._dropped:
                self._dropped.pop().drop()
            for entry in list(self._entries.values()):
                if entry.upkeep is not None and not self._guarded(partial(self._tend, entry, entry.upkeep)):
                    self._forget(entry)

    def _drop_unknown(self) -> None:
        def known() -> set[str]:
            with self._records.read() as connection:
                return {bank.uid for bank in bank_rows.after(connection)}

        drop_unknown(self._settings.data / "indexes", known)

    def _tend(self, entry: _Entry, upkeep: Upkeep) -> None:
        while not self._stopping.is_set() and upkeep.do_next():
            pass
        if self._clock() - entry.used > self._settings.index_idle:
            self._save_tail(upkeep)
            self._forget(entry)
            _log.info("the index of bank %s leaves memory", entry.bank.name)

    @staticmethod
    def _save_tail(upkeep: Upkeep) -> None:
        tail = upkeep.index.segments[-1]
        if tail.rows >= _FEW and tail.rows != tail.saved:
            upkeep.snapshots.save(tail)

    @staticmethod
    def _guarded(task: Callable[[], None]) -> bool:
        """Whether it went well; what failed is logged."""
        try:
            task()
        except Stopped:
            pass
        except Exception:
            _log.exception("the care of an index failed")
            return False
        return True
