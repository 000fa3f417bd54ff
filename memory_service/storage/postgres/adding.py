"""How a chunk gets into the database. This file owns idempotency (a key is written once, and answered the same way for
as long as it is known), that row, key, evictions, quota and usage are one step, and that chunks which wait for the same
bank go in one transaction: the row of the bank is locked until the commit, so that a commit for each would be the speed
of the bank.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psycopg
from sqlalchemy import Connection

from memory_service.domain.clock import Clock
from memory_service.domain.errors import ServiceError, bank_not_found, turn_forgotten
from memory_service.domain.fair_threads import FairThreads
from memory_service.domain.model import Bank, Chunk, Quota
from memory_service.domain.sessions import BRANCH
from memory_service.domain.tenants import TenantQuota
from memory_service.observe.metrics import Metrics
from memory_service.storage.base import Written
from memory_service.storage.chunks import keyed, row_checksum
from memory_service.storage.chunks.counts import Counts, Unwritten
from memory_service.storage.chunks.keyed import Keyed
from memory_service.storage.chunks.removed import Removed
from memory_service.storage.chunks.row import row_of
from memory_service.storage.postgres import changing as changes
from memory_service.storage.postgres.changing import Changing
from memory_service.storage.postgres.database import Database, raw, savepoint
from memory_service.storage.postgres.evicting import CrowdedError, Evicting, Made
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.removal import Removal
from memory_service.storage.postgres.rows import access_rows, bank_rows, change_rows, chunk_rows, gone_rows
from memory_service.storage.postgres.statements import QUOTAS

# Chunks of one transaction, and the bytes of their rows beyond which no more are taken.
_MOST, _MOST_BYTES = 64, 8 * 1024 * 1024
# Tries of chunks that wait for a bank whose capacity is lowered again and again.
_MOST_TRIES = 5
_FORGOTTEN = """
    SELECT EXISTS (
        SELECT 1 FROM turns WHERE branch = %(branch)s AND status = 'forgotten'
        AND start < %(end)s AND start + token_count > %(start)s
    ) OR EXISTS (SELECT 1 FROM gone_branches WHERE branch = %(branch)s AND start <= %(start)s)
"""


@dataclass(slots=True)
class _Addition:
    """A chunk that waits to be added, and the future of its caller."""

    bank: Bank
    chunk: Chunk
    row: Mapping[str, Any]
    done: "Future[Written]" = field(default_factory=Future)
    begun: float = field(default_factory=time.perf_counter)
    made: Made = field(default_factory=Made)

    @property
    def size(self) -> int:
        """Return about how many bytes the row has."""
        return len(self.chunk.embedding) + len(self.chunk.token_ids) + len(self.chunk.text) + 1024


class Adding:
    """Adds chunks, and looks up the keys of those that were added. Threads share it."""

    def __init__(
        self,
        database: Database,
        feed: Feed,
        evicting: Evicting,
        removal: Removal,
        counts: Counts,
        clock: Clock,
        threads: FairThreads,
        metrics: Metrics,
    ) -> None:
        self._database, self.feed = database, feed
        self.evicting, self._removal = evicting, removal
        self.counts, self._clock = counts, clock
        self._threads, self._metrics = threads, metrics
        self._lock = threading.Lock()
        # By bank id: what waits. A bank is here while a thread adds to it, or is about to.
        self._waiting: dict[int, deque[_Addition]] = {}
        self._closed = False

    def replay_of(self, bank: Bank, key: bytes, digest: bytes | None) -> Written | None:
        """Look whether a key was written already; see `Store.replay_of`. Errors: KEY_REUSED."""
        unwritten = self.counts.unwritten()

        def look(connection: Connection) -> Keyed | None:
            return chunk_rows.find_keys(connection, bank.bank_id, [key], unwritten).get(key)

        found = self._database.of(bank.tenant).ask(look)
        if found is None or keyed.counts_no_more(found, digest):
            return None
        return keyed.replay(key, digest, found)

    def add(self, bank: Bank, chunk: Chunk, digest: bytes) -> "Future[Written]":
        """Add a chunk to a bank; see `Store.add`."""
        addition = _Addition(bank, chunk, row_of(bank.bank_id, chunk, digest))
        addition.done.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                addition.done.set_exception(ServiceError("NOT_SERVING", "the service is shutting down"))
                return addition.done
            waiting = self._waiting.get(bank.bank_id)
            if waiting is not None:
                waiting.append(addition)
                return addition.done
            self._waiting[bank.bank_id] = deque([addition])
        self._threads.submit(bank.tenant, partial(self._add_some, bank))
        return addition.done

    def close(self) -> None:
        """Take no chunks any more; those that wait are refused."""
        with self._lock:
            self._closed = True
            left = [each for waiting in self._waiting.values() for each in waiting]
            self._waiting = {bank_id: deque() for bank_id in self._waiting}
        for addition in left:
            addition.done.set_exception(ServiceError("NOT_SERVING", "the service is shutting down"))

    def _add_some(self, bank: Bank) -> None:
        """Add what waits for a bank, as much as one transaction takes; then it is the turn of others."""
        with self._lock:
            waiting, some, size = self._waiting[bank.bank_id], list[_Addition](), 0
            while waiting and len(some) < _MOST and size < _MOST_BYTES:
                some.append(waiting.popleft())
                size += some[-1].size
        try:
            self._add_all(bank, some)
        finally:
            self._go_on(bank)

    def _go_on(self, bank: Bank) -> None:
        """Add what waits for a bank by now, if anything does."""
        with self._lock:
            if not self._waiting[bank.bank_id]:
                del self._waiting[bank.bank_id]
                return
        self._threads.submit(bank.tenant, partial(self._add_some, bank))

    def _add_all(self, bank: Bank, some: Sequence[_Addition]) -> None:
        """Add chunks in one transaction, and tell their callers. Those that a bank must be brought down for are added
        after that."""
        left = list(some)
        for _ in range(_MOST_TRIES):
            try:
                crowded = self._try(bank, left)
            except BaseException as error:
                if isinstance(error, psycopg.errors.UniqueViolation):
                    self.feed.lost()  # another chunk has the id, which the database has given again
                if len(left) > 1 and isinstance(error, psycopg.DataError):
                    for one in left:  # one of them is to blame, and is told so
                        self._add_all(bank, [one])
                else:
                    _fail(left, error)
                return
            if not crowded:
                return
            left = crowded
            try:
                self.evicting.bring_down(bank)
            except Exception as error:
                _fail(left, error)
                return
        _fail(left, CrowdedError())

    def _try(self, bank: Bank, some: Sequence[_Addition]) -> list[_Addition]:
        """Add chunks in one transaction, tell their callers, and return those that are to be added again."""
        group = _Group(self, bank, some)
        database = self._database.of(bank.tenant)
        database.change(group.decide, durable=False, first=group.ask, last=group.write)
        if group.changing is not None:
            self.feed.committed(group.changing, group.changed)
            for removed in group.expired:
                self._removal.went(bank, removed, "chunks_expired")
        for addition, result in zip(some, group.results, strict=True):
            self._metrics.stages["commit"].observe(time.perf_counter() - addition.begun)
            if isinstance(result, Written) and not result.replayed:
                self._applied(bank, addition)
        crowded = []
        for addition, result in zip(some, group.results, strict=True):
            if isinstance(result, CrowdedError):
                crowded.append(addition)
            elif isinstance(result, Exception):
                addition.done.set_exception(result)
            else:
                addition.done.set_result(result)
        if any(addition.made.more for addition in some):
            self.evicting.go_on(bank)
        return crowded

    def _applied(self, bank: Bank, addition: _Addition) -> None:
        """Let figures and objects follow the commit of a chunk."""
        chunk, made = addition.chunk, addition.made
        self._metrics.chunks_written.inc()
        self._metrics.recorder.wrote(bank.title, chunk.chunk_id, chunk.stored_length, chunk.stored_bytes)
        self._removal.evicted(bank, made.evicted, made.reasons)


class _Group:
    """Some chunks of one transaction, each try of which begins with `ask`."""

    def __init__(self, adding: Adding, bank: Bank, some: Sequence[_Addition]) -> None:
        self._adding = adding
        self._bank = bank
        self._some = some

    def ask(self, connection: Connection) -> None:
        """Ask for what `decide` reads, in the order in which all lock who lock these."""
        self.changing: Changing | None = None
        self.changed: change_rows.Changed | None = None
        self.results: list[Written | Exception] = []
        # Chunks that had expired, and were removed so that their keys can be written anew.
        self.expired: list[Removed] = []
        self._known: dict[bytes, Keyed] = {}
        # Chunks that were added and are not rows yet.
        self._pending: list[_Addition] = []
        self._unwritten = self._adding.counts.unwritten()
        self._tenant = access_rows.ask_bounded(connection, self._bank.tenant)
        self._locked = bank_rows.ask_locked(connection, self._bank.bank_id)
        keys = [addition.chunk.key for addition in self._some]
        self._keys = chunk_rows.ask_keys(connection, self._bank.bank_id, keys)

    def decide(self, connection: Connection) -> None:
        """Decide what can be written, and evict what that needs; `results` has what each caller is told."""
        tenant = access_rows.read_bounded(self._tenant)
        self.changing = changes.begun(connection, self._bank, bank_rows.read_locked(self._locked))
        if self.changing is None:
            self.results = [bank_not_found(self._bank.name) for _ in self._some]
            return
        self._adding.feed.begins(self.changing)
        bounded = self.changing.bank.quota != Quota() or (tenant is not None and _bounds(tenant.quota))
        unwritten = self._unwritten
        self._known = chunk_rows.read_keys(self._keys, unwritten)
        for addition in self._some:
            try:
                self.results.append(self._add(self.changing, addition, unwritten, bounded))
            except ServiceError as refusal:
                self.results.append(refusal)

    def write(self, *_: object) -> None:
        """Write what was decided. No result of a statement is read here."""
        if self.changing is not None:
            self._flush()
            self.changed = self.changing.write(self._unwritten.now)

    def _add(self, changing: Changing, addition: _Addition, unwritten: Unwritten, bounded: bool) -> Written:
        """Add one chunk to the bank. Errors: KEY_REUSED, BANK_FULL, TOO_LARGE, QUOTA_EXCEEDED, TURN_FORGOTTEN,
        CrowdedError."""
        chunk, row = addition.chunk, addition.row
        if found := self._known.get(chunk.key):
            digest = None if chunk.if_absent else row_checksum.digest_of(row["digest"])
            if not keyed.counts_no_more(found, digest):
                return keyed.replay(chunk.key, digest, found)
            if not found.removed:
                self._expire(changing, found.chunk_id, unwritten.now)
        if BRANCH in chunk.metadata:
            _check_not_forgotten(changing.connection, chunk)
        addition.made = self._make_room(changing, chunk, bounded)
        self._pending.append(addition)
        changing.vectors[chunk.chunk_id] = chunk.embedding
        changing.tell("added", [chunk.chunk_id])
        sizes = {"chunks": 1, "chunks_written": 1, "tokens": chunk.stored_length, "bytes": chunk.stored_bytes}
        changing.grown.update(sizes)
        self._known[chunk.key] = Keyed(chunk.chunk_id, row_checksum.digest_of(row["digest"]), False, False, False)
        return Written(chunk.key, chunk.chunk_id, evicted=tuple(addition.made.evicted))

    def _make_room(self, changing: Changing, chunk: Chunk, bounded: bool) -> Made:
        """Evict what a chunk needs, and look whether quotas allow it. A refusal takes the evictions back."""
        overflows = self._adding.evicting.overflows(changing, chunk)
        if not overflows and not bounded:
            return Made()
        self._flush()
        if bounded:
            changing.write_usage()
        mark = changing.mark()
        try:
            with savepoint(changing.connection) if overflows else nullcontext():
                made = self._adding.evicting.make_room(changing, chunk) if overflows else Made()
                if bounded:
                    if made.evicted:
                        changing.write_usage()
                    QUOTAS.check_chunk(changing.connection, changing.bank, chunk)
        except BaseException:
            changing.back_to(mark)
            raise
        return made

    def _expire(self, changing: Changing, chunk_id: int, now: int) -> None:
        """Remove a chunk that has expired and is there yet, so that its key can be written anew."""
        removed = gone_rows.remove(changing.connection, changing.bank.bank_id, [chunk_id], now)
        changing.removed(removed, "chunks_expired")
        self.expired.append(removed)

    def _flush(self) -> None:
        """Let the chunks that were added be rows."""
        if self._pending and self.changing is not None:
            rows = [addition.row for addition in self._pending]
            chunk_rows.insert(self.changing.connection, rows, [each.chunk.metadata for each in self._pending])
            self._pending.clear()


def _fail(some: Sequence[_Addition], error: BaseException) -> None:
    """Tell those callers an error who were told nothing yet."""
    for addition in some:
        if not addition.done.done():
            addition.done.set_exception(error)


def _bounds(quota: TenantQuota) -> bool:
    """Tell whether a quota bounds what is written."""
    return any((quota.chunks, quota.tokens, quota.bytes))


def _check_not_forgotten(connection: Connection, chunk: Chunk) -> None:
    """Refuse a chunk of a session whose tokens were forgotten: its writer has the turns of before in its mind. Errors:
    TURN_FORGOTTEN."""
    branch = chunk.metadata[BRANCH]
    if not isinstance(branch, str):
        return
    asked = {"branch": branch, "start": chunk.start, "end": chunk.start + chunk.original_length}
    row = raw(connection).execute(_FORGOTTEN, asked).fetchone()
    if row is not None and row[0]:
        raise turn_forgotten(branch, chunk.start)
