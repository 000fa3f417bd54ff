"""The indexes of all banks: loaded on first use, kept in step with the store, cared for, put to rest. This file owns
that an index equals the store: it is loaded from one moment of that, and learns what was committed meanwhile before
anything searches it; an index that misses a change is dropped."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from memory_service.domain import cancellation
from memory_service.domain.errors import bank_not_found
from memory_service.domain.limits import INDEX, NO_PAUSES, IndexLimits, Pauses
from memory_service.domain.model import Bank, IndexStats
from memory_service.search.ahead import Ahead
from memory_service.search.candidates import Vectors
from memory_service.search.index import BankIndex
from memory_service.search.ivf import Ivf, Stopped
from memory_service.search.loading import load
from memory_service.search.snapshots import Snapshots, drop_unknown
from memory_service.search.upkeep import Upkeep
from memory_service.storage.base import Store

# So few rows of a tail are read from the store as fast as from a file.
_FEW = 512
# A thread that waits for another to load an index looks so often, in seconds, whether its caller is still there.
_LOOK_S = 0.1
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Entry:
    """The index of a bank with its care; while it is being loaded that is None, and `changes` are what it has to
    learn."""

    bank: Bank
    upkeep: Upkeep | None = None
    changes: list[Callable[[BankIndex], object]] = field(default_factory=list)
    used: float = 0.0


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """Says how indexes are kept. `folder` is for their snapshots, which leave `min_free` bytes of its disk and are
    synced where they are to be `durable`. A bank gets lists from `ivf_from` vectors on. An index that was not searched
    for `idle_s` seconds leaves the memory."""

    folder: Path
    ivf_from: int
    idle_s: float
    min_free: int
    durable: bool
    limits: IndexLimits = INDEX


class SearchIndexes:
    """The indexes of all banks of a store. It implements `memory_service.storage.base.Follower`: `added`, `removed`,
    `altered`, `changed` and `dropped` are called by the store in the order of commits, the rest by any thread."""

    def __init__(
        self,
        store: Store,
        options: IndexOptions,
        clock: Callable[[], float] = time.monotonic,
        pauses: Pauses = NO_PAUSES,
    ) -> None:
        """Begin to care for the indexes. clock: seconds, by which an index is idle."""
        self._store = store
        self._options = options
        self._pauses = pauses
        self._clock = clock
        self._entries: dict[int, _Entry] = {}
        self._loading: dict[int, threading.Lock] = {}
        self._ahead: Ahead[BankIndex] = Ahead()
        self._dropped: list[Snapshots] = []
        self._purges: queue.SimpleQueue[tuple[_Entry | None, Future[int | None]]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._work = threading.Event()
        self._thread = threading.Thread(target=self._care, name="kvbank-index", daemon=True)
        self._thread.start()

    def get(self, bank: Bank) -> BankIndex:
        """Return the index of a bank, which is loaded where it is not in memory.

        A caller that holds a view of the store must not call this: there are only so many views. Errors:
        BANK_NOT_FOUND, FlawedError, Cancelled.
        """
        entry = self._entries.get(bank.bank_id)
        upkeep = entry.upkeep if entry else None
        if entry is None or upkeep is None:
            entry, upkeep = self._loaded(bank)
        entry.used = self._clock()
        return upkeep.index

    def soon(self, bank: Bank) -> BankIndex | None:
        """Return the index of a bank; None where it is not in memory, takes long to be loaded, and the store can search
        by itself. Then it is being loaded. Errors: as those of `get`."""
        entry = self._entries.get(bank.bank_id)
        if not self._store.searches or (entry is not None and entry.upkeep is not None):
            return self.get(bank)
        loading = self._ahead.of(bank.bank_id, partial(self.get, bank))
        wait([loading], self._options.limits.patience_s)
        return loading.result() if loading.done() else None

    def at_hand(self, bank: Bank) -> BankIndex | None:
        """Return the index of a bank; None where it is not in memory."""
        entry = self._entries.get(bank.bank_id)
        if entry is None or entry.upkeep is None:
            return None
        entry.used = self._clock()
        return entry.upkeep.index

    def __len__(self) -> int:
        """Count the banks whose index is in memory, or was being loaded."""
        return len(self._entries.keys() | self._loading.keys())

    def stats(self, bank: Bank) -> IndexStats:
        """Return the figures of the index of a bank now."""
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
        """Save what is in no snapshot, and end. Nothing may search or change any more."""
        self._stopping.set()
        self._ahead.close()
        self._work.set()
        self._thread.join()
        for entry in self._entries.values():
            if entry.upkeep is not None:
                self._save_tail(entry.upkeep)

    # Changes

    def added(self, bank: Bank, ids: Sequence[int], vectors: Vectors) -> None:
        """Learn that chunks were added: ids [n] and vectors [n, d]."""
        new = np.array(ids, np.int64)
        self._change(bank, lambda index: index.add(new, vectors))

    def removed(self, bank: Bank, ids: Sequence[int]) -> None:
        """Learn that chunks are gone; some of them may not be there."""
        gone = np.array(ids, np.int64)
        self._change(bank, lambda index: index.remove(gone))

    def altered(self, bank: Bank, ids: Sequence[int]) -> None:
        """Learn that chunks have other metadata, which vectors do not go by."""

    def changed(self, bank: Bank) -> None:
        """Learn what a bank says of itself now, such as another kind of index."""
        if (entry := self._entries.get(bank.bank_id)) is None:
            return
        entry.bank = bank
        if entry.upkeep is not None:
            entry.upkeep.kind = bank.index
            self._work.set()

    def dropped(self, bank: Bank) -> None:
        """Learn that a bank is deleted, or to be read anew."""
        self._entries.pop(bank.bank_id, None)
        self._loading.pop(bank.bank_id, None)
        self._dropped.append(self._snapshots(bank).moved())
        self._work.set()

    def purge(self, bank: Bank | None) -> int:
        """Take the vectors of chunks that are gone out of memory and files; see `Follower.purge`."""
        if bank is None:
            return self._ask_to_purge(None) or 0
        made = None
        while made is None and (bank.bank_id in self._entries or self._snapshots(bank).any()):
            self.get(bank)
            if (entry := self._entries.get(bank.bank_id)) is not None:
                made = self._ask_to_purge(entry)
        return made or 0

    def _ask_to_purge(self, entry: _Entry | None) -> int | None:
        asked: Future[int | None] = Future()
        self._purges.put((entry, asked))
        self._work.set()
        return asked.result()

    def _change(self, bank: Bank, change: Callable[[BankIndex], bool]) -> None:
        entry = self._entries.get(bank.bank_id)
        if entry is None:
            return
        if entry.upkeep is None:
            entry.changes.append(change)
            return
        try:
            self._pauses.reach("index told")
            if change(entry.upkeep.index):
                self._work.set()
        except Exception:
            # It would be wrong for good; the next search loads it anew. What else follows the commit is done.
            _log.exception("the index of bank %s misses a change and is dropped", bank.title)
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
        """Load an index in the thread of the caller; only its beginning and its end are between two commits."""
        entry, snapshots = _Entry(bank, used=self._clock()), self._snapshots(bank)

        def begin() -> None:
            self._entries[bank.bank_id] = entry

        def publish(index: BankIndex) -> Upkeep:
            for change in entry.changes:
                change(index)
            entry.changes.clear()
            entry.upkeep = Upkeep(index, entry.bank.index, self._options.ivf_from, snapshots, self._stopping.is_set)
            return entry.upkeep

        started = time.perf_counter()
        try:
            with self._store.snapshot(bank, begin) as view:
                if not view.exists(bank):
                    # Deleted since it was looked up: nothing would drop it again.
                    self._loading.pop(bank.bank_id, None)
                    raise bank_not_found(bank.name)
                index = load(view.ids(bank), partial(view.vectors, bank), snapshots)
            self._pauses.reach("index loaded")
            upkeep = self._store.in_order(bank, partial(publish, index)).result()
        except BaseException:
            self._forget(entry)
            raise
        _log.info("index of bank %s: %d vectors in %.3f s", bank.title, len(index), time.perf_counter() - started)
        self._work.set()
        return entry, upkeep

    def _snapshots(self, bank: Bank) -> Snapshots:
        return Snapshots(
            folder=self._options.folder / bank.uid,
            store_id=self._store.store_id,
            dimension=bank.embedding.dimension,
            min_free=self._options.min_free,
            durable=self._options.durable,
            limits=self._options.limits,
        )

    # Care, in a thread of its own

    def _care(self) -> None:
        self._guarded(self._drop_unknown)
        while not self._stopping.is_set():
            self._work.wait(min(60.0, self._options.idle_s / 4))
            self._work.clear()
            while self._dropped:
                self._dropped.pop().drop()
            self._purge_asked()
            for entry in list(self._entries.values()):
                if entry.upkeep is not None and not self._guarded(partial(self._tend, entry, entry.upkeep)):
                    self._forget(entry)

    def _purge_asked(self) -> None:
        """Take out of indexes what is gone, where that was asked for; None is the answer for an index that has left
        memory meanwhile."""
        while not self._purges.empty():
            entry, asked = self._purges.get()
            try:
                here = entry is not None and self._entries.get(entry.bank.bank_id) is entry
                asked.set_result(entry.upkeep.purge() if here and entry and entry.upkeep else None)
            except Exception as error:
                asked.set_exception(error)

    def _drop_unknown(self) -> None:
        def known() -> set[str]:
            return {bank.uid for bank in self._store.known_banks()}

        drop_unknown(self._options.folder, known)

    def _tend(self, entry: _Entry, upkeep: Upkeep) -> None:
        while not self._stopping.is_set() and upkeep.do_next():
            pass
        if self._clock() - entry.used > self._options.idle_s:
            self._save_tail(upkeep)
            self._forget(entry)
            _log.info("the index of bank %s leaves memory", entry.bank.title)

    @staticmethod
    def _save_tail(upkeep: Upkeep) -> None:
        tail = upkeep.index.segments[-1]
        if tail.rows >= _FEW and tail.rows != tail.saved:
            upkeep.snapshots.save(tail)

    @staticmethod
    def _guarded(task: Callable[[], None]) -> bool:
        """Run a task, and return whether it went well; what fails is logged."""
        try:
            task()
        except Stopped:
            pass
        except Exception:
            _log.exception("the care of an index failed")
            return False
        return True
