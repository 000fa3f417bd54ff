"""How a chunk gets into the records. This file owns idempotency (a key is written once, and answered the same way for
as long as it is known) and that row, key, evictions, quota, usage and the bytes of a file that is not synced are one
step."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from sqlalchemy import Connection

from memory_service.domain.errors import ServiceError, bank_not_found, turn_forgotten
from memory_service.domain.model import Bank, Chunk, Quota
from memory_service.domain.sessions import BRANCH
from memory_service.observe.metrics import Metrics
from memory_service.storage.base import New, Written
from memory_service.storage.chunks import keyed, row_checksum
from memory_service.storage.chunks.row import row_of
from memory_service.storage.followers import Followers
from memory_service.storage.local.evicting.capacity import NOTHING_MADE, Capacities, CrowdedError, Made, UnplannedError
from memory_service.storage.local.evicting.planning import UNPLANNED, Planned
from memory_service.storage.local.evicting.removal import Removal
from memory_service.storage.local.files.unsynced import Unsynced
from memory_service.storage.local.known_banks import KnownBanks
from memory_service.storage.local.records import chunk_rows, forgotten_turns, unsynced_rows
from memory_service.storage.local.records.records import Records
from memory_service.storage.local.records.writer import Operation, savepoint
from memory_service.storage.local.rows import QUOTAS

# The chunks of one step, so that a transaction can end behind it.
_MOST_TOGETHER = 64


class _ExpiredError(Exception):
    """The error of an addition whose key is that of a chunk that has expired and whose row is still there."""

    def __init__(self, chunk_id: int) -> None:
        super().__init__(f"chunk {chunk_id} is not removed yet")
        self.chunk_id = chunk_id


@dataclass(frozen=True, slots=True)
class Adding:
    """Adds chunks to the records, and looks up the keys of those that were added."""

    records: Records
    known: KnownBanks
    capacities: Capacities
    removal: Removal
    followers: Followers
    unsynced: Unsynced
    metrics: Metrics

    def replay_of(self, bank: Bank, key: bytes, digest: bytes | None) -> Written | None:
        """Look whether a key was written already; see `Store.replay_of`. Errors: KEY_REUSED."""
        unwritten = self.records.counts.unwritten()
        # What a caller has sent whole is written, also where the caller has gone by now.
        with self.records.read(to_the_end=True) as connection:
            found = chunk_rows.find_key(connection, bank.bank_id, key, unwritten)
        return None if found is None or keyed.counts_no_more(found, digest) else keyed.replay(key, digest, found)

    def add(self, new: Sequence[New]) -> "list[Future[Written]]":
        """Add chunks to banks; see `Store.add`."""
        additions = [_Addition(self, bank, chunk, row_of(bank.bank_id, chunk, digest)) for bank, chunk, digest in new]
        for addition in additions:
            addition.done.set_running_or_notify_cancel()
            if addition.chunk.payload is not None:
                addition.done.add_done_callback(partial(self._let_go, addition.bank, addition.chunk.chunk_id))
        self._commit([addition for addition in additions if not self._waits(addition)])
        return [addition.done for addition in additions]

    def _let_go(self, bank: Bank, chunk_id: int, done: "Future[Written]") -> None:
        """Let go of the bytes of the chunk's file, which are in the records where the chunk was added."""
        added = done.exception() is None and not done.result().replayed
        self.unsynced.let_go(bank.uid, chunk_id, recorded=added)

    def _waits(self, addition: "_Addition") -> bool:
        """Tell whether an addition has to wait for something before it is committed. No thread waits: the one that has
        brought the bank down, or read its ledger, goes on with the addition."""
        waited = self.capacities.waited_for(addition.bank.bank_id, addition.chunk)
        if waited is not None:
            waited.add_done_callback(partial(self._waited, addition))
        return waited is not None

    def _waited(self, addition: "_Addition", waited: "Future[Any]") -> None:
        if not waited.cancelled() and (error := waited.exception()) is not None:
            addition.done.set_exception(error)
        else:
            self._commit([addition])

    def _planned(self, addition: "_Addition", planned: "Future[Planned]") -> None:
        """Go on with an addition when it has a plan of what it evicts."""
        if planned.cancelled():
            addition.done.set_exception(ServiceError("NOT_SERVING", "the service is shutting down"))
        elif (error := planned.exception()) is not None:
            addition.done.set_exception(error)
        else:
            addition.plan = planned.result()
            # The capacity may have changed meanwhile, or the ledger be gone with a transaction that failed.
            self._again(addition)

    def _again(self, addition: "_Addition") -> None:
        if not self._waits(addition):
            self._commit([addition])

    def _commit(self, additions: "Sequence[_Addition]") -> None:
        """Commit additions to banks of one tenant, when they have nothing more to wait for: together, where they are of
        one bank that is not known to be bounded."""
        for _, found in groupby(additions, lambda addition: addition.bank.bank_id):
            some = list(found)
            bank = some[0].bank
            if len(some) > 1 and bank.capacity is None and bank.quota == Quota():
                begun = time.perf_counter()
                together = [
                    _Together(self, bank, some[at : at + _MOST_TOGETHER], begun)
                    for at in range(0, len(some), _MOST_TOGETHER)
                ]
                operations = [Operation(each.commit, each.applied, each.ended) for each in together]
                self.records.writer.submit_all(operations, tenant=bank.tenant)
            else:
                self.commit_each(some)

    def commit_each(self, additions: "Sequence[_Addition]") -> None:
        """Commit additions to a bank one by one."""
        begun = time.perf_counter()
        operations = [
            Operation(addition.commit, addition.applied, partial(self._committed, addition, begun))
            for addition in additions
        ]
        self.records.writer.submit_all(operations, tenant=additions[0].bank.tenant)

    def insert(self, connection: Connection, bank: Bank, additions: "Sequence[_Addition]") -> bool:
        """Write what additions to a bank put into the records, and return True; False where the bank is gone."""
        if not chunk_rows.insert(connection, bank.bank_id, [addition.row for addition in additions]):
            return False
        ids = [addition.chunk.chunk_id for addition in additions]
        unsynced_rows.insert(connection, self.unsynced.held(ids))
        return True

    def _committed(self, addition: "_Addition", begun: float, written: Written, error: Exception | None) -> None:
        self.metrics.stages["commit"].observe(time.perf_counter() - begun)
        if error is None:
            addition.done.set_result(written)
        elif isinstance(error, CrowdedError):
            # The capacity was lowered since it was looked at.
            self._again(addition)
        elif isinstance(error, UnplannedError):
            planned = self.capacities.planned(addition.bank, addition.chunk)
            planned.add_done_callback(partial(self._planned, addition))
        elif isinstance(error, _ExpiredError):
            removed = self.removal.remove(addition.bank, [error.chunk_id], "chunks_expired")
            removed.add_done_callback(partial(self._waited, addition))
        else:
            addition.done.set_exception(error)

    def added(self, bank: Bank, chunks: Sequence[Chunk]) -> None:
        """Let the followers and the figures follow the commit of chunks that were added to a bank."""
        self.metrics.chunks_written.inc(len(chunks))
        for chunk in chunks:
            self.metrics.recorder.wrote(bank.title, chunk.chunk_id, chunk.stored_length, chunk.stored_bytes)
        vectors = np.frombuffer(b"".join(chunk.embedding for chunk in chunks), "<f4")
        self.followers.added(bank, [chunk.chunk_id for chunk in chunks], vectors.reshape(len(chunks), -1))


@dataclass(slots=True)
class _Addition:
    """An addition under way. `commit` and `applied` run in the writer's thread."""

    adding: Adding
    bank: Bank
    chunk: Chunk
    row: Mapping[str, Any]
    plan: Planned = UNPLANNED
    made: Made = NOTHING_MADE
    done: "Future[Written]" = field(default_factory=Future)

    def commit(self, connection: Connection) -> Written:
        """Write row, key, evictions and usage in one transaction.

        Errors: KEY_REUSED, BANK_NOT_FOUND, BANK_FULL, TOO_LARGE, QUOTA_EXCEEDED, TURN_FORGOTTEN.
        """
        chunk, bank_id = self.chunk, self.bank.bank_id
        unwritten = self.adding.records.counts.unwritten()
        if found := chunk_rows.find_key(connection, bank_id, chunk.key, unwritten):
            digest = None if chunk.if_absent else row_checksum.digest_of(self.row["digest"])
            if not keyed.counts_no_more(found, digest):
                return keyed.replay(chunk.key, digest, found)
            if not found.removed:
                raise _ExpiredError(found.chunk_id)
            chunk_rows.free_key(connection, bank_id, chunk.key, found.chunk_id)
        bank = self.adding.known.current(bank_id)
        if bank is None:
            raise bank_not_found(self.bank.name)
        self._check_not_forgotten(connection)
        self.stamp()
        # A refusal takes the evictions back.
        with savepoint(connection) if bank.capacity else nullcontext():
            self.made = self.adding.capacities.make(connection, bank, chunk, self.plan)
            QUOTAS.check_chunk(connection, bank, chunk)
            if not self.adding.insert(connection, bank, [self]):
                raise bank_not_found(bank.name)
        self.adding.capacities.enter(bank, chunk, self.made)
        return Written(chunk.key, chunk.chunk_id, evicted=tuple(self.made.evicted))

    def _check_not_forgotten(self, connection: Connection) -> None:
        """Refuse a chunk of a session whose tokens were forgotten: its writer has the turns of before in its mind.
        Errors: TURN_FORGOTTEN."""
        if forgotten_turns.refuses(connection, self.chunk):
            raise turn_forgotten(str(self.chunk.metadata[BRANCH]), self.chunk.start)

    def stamp(self) -> None:
        """Stamp the row anew where the clock has leapt since it was made: its times would leave the chunk less time to
        live."""
        clock = self.adding.records.clock
        if self.chunk.created < clock.leapt:
            self.chunk = replace(self.chunk, created=clock.now_us())
            digest = row_checksum.digest_of(self.row["digest"])
            self.row = row_of(self.bank.bank_id, self.chunk, digest)

    def applied(self, written: Written) -> None:
        """Let the followers, the figures and the evictions follow the commit."""
        if not written.replayed:
            self.adding.added(self.bank, [self.chunk])
            if self.made.evicted:
                self.adding.capacities.applied(self.bank, self.made)


@dataclass(frozen=True, slots=True)
class _Together:
    """Additions to one bank, which are written by one statement a table, as far as nothing speaks against that. The
    others are committed one by one, behind them. `commit`, `applied` and `ended` run in the writer's thread."""

    adding: Adding
    bank: Bank
    additions: Sequence[_Addition]
    begun: float

    def commit(self, connection: Connection) -> Sequence[_Addition]:
        """Write rows, keys and usage of the additions that are plain, where nothing bounds the bank; return these."""
        bank = self.adding.known.current(self.bank.bank_id)
        if bank is None or bank.capacity is not None or QUOTAS.bounds(connection, bank):
            return ()
        plain, keys = list[_Addition](), [addition.chunk.key for addition in self.additions]
        known = chunk_rows.known_keys(connection, bank.bank_id, keys)
        for key, addition in zip(keys, self.additions, strict=True):
            if key not in known and not forgotten_turns.refuses(connection, addition.chunk):
                addition.stamp()
                plain.append(addition)
                known.add(key)  # for those behind it
        return plain if plain and self.adding.insert(connection, bank, plain) else ()

    def applied(self, written: Sequence[_Addition]) -> None:
        """Let the followers and the figures follow the commit."""
        if written:
            self.adding.added(self.bank, [addition.chunk for addition in written])

    def ended(self, written: Sequence[_Addition], error: Exception | None) -> None:
        """Tell how the additions have ended, and commit those that are left."""
        if error is not None:
            for addition in self.additions:
                addition.done.set_exception(error)
            return
        took = time.perf_counter() - self.begun
        for addition in written:
            self.adding.metrics.stages["commit"].observe(took)
            addition.done.set_result(Written(addition.chunk.key, addition.chunk.chunk_id))
        if left := [addition for addition in self.additions if not addition.done.done()]:
            self.adding.commit_each(left)
