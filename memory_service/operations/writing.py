"""One chunk's way into a bank: checked, stored, committed, applied. Owns that order (file, row, index, answer) and
idempotency: a key is written once, and answered the same way for as long as it is known."""

import json
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from sqlalchemy import Connection

from memory_service.domain import digest as digests
from memory_service.domain.chunk_size import size_of, stored_bytes
from memory_service.domain.errors import QuotaError, ServiceError
from memory_service.domain.model import Bank, Chunk, Payload, Quota, Unit
from memory_service.domain.payload import Buffer, check_bytes, copy_of
from memory_service.observe.metrics import Metrics
from memory_service.search import SearchIndexes
from memory_service.storage.background import Janitor
from memory_service.storage.base import NotThereError, Written
from memory_service.storage.local.evicting.capacity import CrowdedError, Made, Room
from memory_service.storage.local.files.disk_space import DiskSpace
from memory_service.storage.local.files.objects import Payloads
from memory_service.storage.local.files.staging import StagedFile
from memory_service.storage.local.known_banks import Directory, bank_not_found, not_mounted
from memory_service.storage.local.records import bank_rows, chunk_rows, row_checksum
from memory_service.storage.local.records.records import Records
from memory_service.storage.local.records.writer import savepoint

_UNITS: tuple[Unit, ...] = ("chunks", "tokens", "bytes")


@dataclass(frozen=True, slots=True)
class Writes:
    """Writes the chunks of a data folder."""

    space: DiskSpace
    directory: Directory
    records: Records
    payloads: Payloads
    indexes: SearchIndexes
    room: Room
    janitor: Janitor
    metrics: Metrics

    def begin(self, bank: Bank, chunk_id: int, chunk: Chunk, data: Buffer | StagedFile) -> "Future[Written]":
        """Store an admitted chunk; the future resolves when it is durable and can be found.

        `data`: the payload's tensors in descriptor order, with the checksums (seed 0) that the descriptor states.
        Errors: CHECKSUM_IN_TRANSIT, TENSOR_MISMATCH, DISK_FULL, STAGED_FILE; by the future those of `_Write.commit`.
        """
        reserved = self.space.for_records(len(chunk.text) + len(chunk.token_ids) + len(chunk.embedding))
        try:
            digest = digests.of_request(chunk)
            expiry = bank.expiry if chunk.expiry is None else chunk.expiry
            created = self.records.clock.now_us()
            size = stored_bytes(chunk, json.dumps(dict(chunk.metadata)))
            stored = replace(
                chunk, chunk_id=chunk_id, bank=bank.name, created=created, expiry=expiry, stored_bytes=size
            )
            if chunk.payload is not None:
                stored = replace(stored, payload=self._store(bank, stored, chunk.payload, digest, data))
            done = self._submit(_Write(self, bank, stored, chunk_rows.row_of(bank.bank_id, stored, digest)))
        except BaseException:
            reserved.give()
            raise
        done.add_done_callback(lambda _: reserved.give())
        return done

    def _submit(self, write: "_Write") -> "Future[Written]":
        done: Future[Written] = Future()
        done.set_running_or_notify_cancel()
        if write.chunk.payload is not None:
            done.add_done_callback(write.settled)
        self._wait(write, done)
        return done

    def _wait(self, write: "_Write", done: "Future[Written]") -> None:
        """Commit a write when it has nothing more to wait for. No thread waits: the one that has brought the bank down,
        or read its ledger, goes on with the write."""
        waited = self.room.waited_for(write.bank.bank_id, write.chunk)
        if waited is None:
            self._commit(write, done)
        else:
            waited.add_done_callback(lambda waited: self._waited(write, done, waited))

    def _waited(self, write: "_Write", done: "Future[Written]", waited: "Future[None]") -> None:
        if not waited.cancelled() and (error := waited.exception()) is not None:
            done.set_exception(error)
        else:
            self._commit(write, done)

    def _commit(self, write: "_Write", done: "Future[Written]") -> None:
        begun = time.perf_counter()

        def committed(future: "Future[Written]") -> None:
            self.metrics.stages["commit"].observe(time.perf_counter() - begun)
            error = future.exception()
            if isinstance(error, CrowdedError):
                # The capacity was lowered since it was looked at.
                self._wait(write, done)
            elif error is not None:
                done.set_exception(error)
            else:
                done.set_result(future.result())

        self.records.writer.submit(write.commit, write.applied).add_done_callback(committed)

    def _store(self, bank: Bank, chunk: Chunk, payload: Payload, digest: bytes, data: Buffer | StagedFile) -> Payload:
        if not isinstance(data, StagedFile):
            check_bytes(chunk, data)
        # What is staged is on the disk already.
        size = 0 if isinstance(data, StagedFile) else len(data)
        copy = partial(copy_of, chunk, digest)
        try:
            with self.space.for_payload(size), self.metrics.stages["store"].time():
                if isinstance(data, StagedFile):
                    check = partial(check_bytes, chunk)
                    return self.payloads.adopt(bank.uid, chunk.chunk_id, payload, data, check, copy)
                return self.payloads.write(bank.uid, chunk.chunk_id, payload, data, copy)
        except (NotThereError, FileNotFoundError, NotADirectoryError) as error:
            if self.directory.current(bank.bank_id) is None:
                raise bank_not_found(bank.name) from None
            raise not_mounted(bank.name) from error


@dataclass(slots=True)
class _Write:
    """A write whose file is in place; the writer's thread does the rest."""

    path: Writes
    bank: Bank
    chunk: Chunk
    row: Mapping[str, Any]
    made: Made = field(default_factory=Made)

    def commit(self, connection: Connection) -> Written:
        """Write row, evictions and usage in one transaction.

        Errors: KEY_REUSED, BANK_NOT_FOUND, BANK_FULL, TOO_LARGE, QUOTA_EXCEEDED.
        """
        chunk, bank_id = self.chunk, self.bank.bank_id
        unwritten = self.path.records.counts.unwritten()
        if found := chunk_rows.find_key(connection, bank_id, chunk.key, unwritten):
            return self._replay(*found)
        bank = self.path.directory.current(bank_id)
        if bank is None:
            raise bank_not_found(self.bank.name)
        self._stamp()
        # A refusal takes the evictions back.
        with savepoint(connection) if bank.capacity else nullcontext():
            self.made = self.path.room.make(connection, bank, chunk)
            if bank.quota != Quota():
                _check_quota(connection, bank, chunk)
            if not chunk_rows.insert(connection, self.row):
                raise bank_not_found(bank.name)
        self.path.room.enter(bank, chunk, self.made)
        return Written(chunk.key, chunk.chunk_id, evicted=tuple(self.made.evicted))

    def _stamp(self) -> None:
        """Stamp the row anew where the clock has leapt since it was made: its times would leave the chunk less time to
        live."""
        clock = self.path.records.clock
        if self.chunk.created < clock.leapt:
            self.chunk = replace(self.chunk, created=clock.now_us())
            digest = row_checksum.digest_of(self.row["digest"])
            self.row = chunk_rows.row_of(self.bank.bank_id, self.chunk, digest)

    def _replay(self, chunk_id: int, digest: bytes, gone: bool) -> Written:
        key = self.chunk.key
        if digest != row_checksum.digest_of(self.row["digest"]):
            text = f"idempotency key {key.hex()} was used for other content (chunk {chunk_id})"
            raise ServiceError("KEY_REUSED", text, key=key.hex(), chunk_id=chunk_id)
        return Written(key, chunk_id, replayed=True, gone=gone)

    def applied(self, written: Written) -> None:
        """Let the index, the figures and the evictions follow the commit; this runs in the writer's thread."""
        if not written.replayed:
            self.path.metrics.chunks_written.inc()
            vector = np.frombuffer(self.chunk.embedding, "<f4")
            self.path.indexes.added(self.bank, [self.chunk.chunk_id], vector[None])
            if self.made.evicted:
                self.path.room.applied(self.bank, self.made)

    def settled(self, done: "Future[Written]") -> None:
        """Remove the file of a chunk that was refused, or is there already.

        After a commit that failed nobody knows whether a row names the file; the next start looks at the records.
        """
        error = done.exception()
        if isinstance(error, ServiceError) or (error is None and done.result().replayed):
            self.path.janitor.later(self.path.payloads.unlink, self.bank.uid, [self.chunk.chunk_id])


def _check_quota(connection: Connection, bank: Bank, chunk: Chunk) -> None:
    """Refuse a chunk beyond the quota; call this after the evictions, which may have made room. Errors: BANK_NOT_FOUND,
    QUOTA_EXCEEDED."""
    usage = bank_rows.usage(connection, bank.bank_id)
    if usage is None:
        raise bank_not_found(bank.name)
    for unit in _UNITS:
        check_quota(bank, unit, getattr(usage, unit), size_of(chunk, unit))


def check_quota(bank: Bank, unit: Unit, used: int, more: int) -> None:
    """Refuse what would take more than the quota. Errors: QUOTA_EXCEEDED."""
    limit = getattr(bank.quota, unit)
    if limit and used + more > limit:
        raise QuotaError(bank.name, unit, used, limit, more)
