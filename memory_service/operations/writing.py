"""One chunk's way into a bank, over any engine. This file owns its order: the chunk is checked (`admit`), it gets its
id, a repeated write is found, its object is stored durably, its row is added, the write is acknowledged.

An object whose row is refused, or was written before, is deleted. After an addition that failed it is not known whether
a row names the object; the next start looks at that.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from memory_service.domain import digest as digests
from memory_service.domain import validate
from memory_service.domain.chunk_size import stored_bytes
from memory_service.domain.errors import ServiceError, bank_not_found, not_mounted
from memory_service.domain.limits import NO_PAUSES, Pauses
from memory_service.domain.model import Bank, Chunk, Payload
from memory_service.domain.payload import Buffer, check_bytes, copy_of
from memory_service.observe.metrics import Metrics
from memory_service.storage.base import Engine, New, NotThereError, Reservation, Staged, Store, Written


@dataclass(slots=True)
class Admitted:
    """A chunk that was checked, before its bytes are taken. `waits` gives it its id, which `chunk` lacks."""

    bank: Bank
    chunk: Chunk
    store: Store
    chunk_id: int = 0

    def waits(self) -> Iterator["Future[Any]"]:
        """Yield what is to be waited for before the bytes of the chunk are taken, one after the other: room in a bank
        whose capacity was lowered, ids that are reserved. The id is taken last, so that the ids of a stream ascend in
        its order. Never blocks."""
        if (waited := self.store.room_for(self.bank, self.chunk)) is not None:
            yield waited
        while not isinstance(chunk_id := self.store.new_id(), int):
            yield chunk_id
        self.chunk_id = chunk_id


class Writes:
    """Writes chunks into the banks of an engine."""

    def __init__(self, engine: Engine, metrics: Metrics, max_chunk_bytes: int, pauses: Pauses = NO_PAUSES) -> None:
        self._engine = engine
        self._store = engine.store
        self._metrics = metrics
        self._max_chunk_bytes = max_chunk_bytes
        self._pauses = pauses

    def admit(self, bank: Bank, reader_digest: str, embedder_digest: str, chunk: Chunk) -> Admitted:
        """Check a chunk before its bytes are taken; this touches no disk. Errors: those of a write that need no
        bytes."""
        validate.reader(bank, reader_digest)
        validate.embedder(bank, embedder_digest)
        validate.chunk(bank, chunk, self._max_chunk_bytes)
        return Admitted(bank, chunk, self._store)

    def begin(self, some: Sequence[tuple[Admitted, Buffer | Staged]]) -> "list[Future[Written]]":
        """Store admitted chunks of one tenant that have their ids; the future of each resolves when it is durable and
        can be found.

        some: each chunk with the payload's tensors in descriptor order, with the checksums (seed 0) that the descriptor
        states. Errors, by the futures: CHECKSUM_IN_TRANSIT, TENSOR_MISMATCH, DISK_FULL, STAGED_FILE, KEY_REUSED, those
        of `Store.add`.
        """
        try:
            reserved = self._engine.space.for_records(sum(self._record_bytes(*each) for each in some))
        except Exception as error:
            return [_failed(error) for _ in some]
        try:
            begun = [self._begun(admitted, data) for admitted, data in some]
            added = iter(self._store.add([each for each in begun if isinstance(each, New)]))
        except BaseException:
            reserved.give()
            raise
        found = [next(added) if isinstance(each, New) else each for each in begun]
        for each, done in zip(begun, found, strict=True):
            if isinstance(each, New) and each.chunk.payload is not None:
                done.add_done_callback(partial(self._settled, each.bank, each.chunk.chunk_id))
        _when_all_are_done(found, reserved.give)
        return found

    def _record_bytes(self, admitted: Admitted, data: Buffer | Staged) -> int:
        """Return the bytes that a chunk takes of the records, about. A payload that is stored without a wait may stand
        there until it is durable."""
        chunk = admitted.chunk
        own = len(chunk.text) + len(chunk.token_ids) + len(chunk.embedding)
        if isinstance(data, Buffer) and not self._engine.objects.waits(own + len(data)):
            own += own + len(data)
        return own

    def _begun(self, admitted: Admitted, data: Buffer | Staged) -> "New | Future[Written]":
        """Store the object of a chunk, and return what is to be added, or how the write has ended already."""
        try:
            return self._stored_chunk(admitted.bank, admitted.chunk, admitted.chunk_id, data)
        except Exception as error:
            return _failed(error)

    def _stored_chunk(self, bank: Bank, chunk: Chunk, chunk_id: int, data: Buffer | Staged) -> "New | Future[Written]":
        digest = digests.of_request(chunk)
        expiry = bank.expiry if chunk.expiry is None else chunk.expiry
        size = stored_bytes(chunk, json.dumps(dict(chunk.metadata)))
        created = self._store.clock.now_us()
        stored = replace(chunk, chunk_id=chunk_id, bank=bank.name, created=created, expiry=expiry, stored_bytes=size)
        if chunk.payload is None:
            return New(bank, stored, digest)
        if isinstance(data, Buffer):
            check_bytes(chunk, data)
        if (written := self._replay_of(bank, chunk, digest, data)) is not None:
            return _done(written)
        return New(bank, replace(stored, payload=self._stored(bank, stored, chunk.payload, digest, data)), digest)

    def _replay_of(self, bank: Bank, chunk: Chunk, digest: bytes, data: Buffer | Staged) -> Written | None:
        """Find an earlier write of the same key, before anything is stored. What was staged for this one is removed.
        Errors: KEY_REUSED; those of `_place_missing` where the object of that write cannot be there."""
        written: Written | None = None
        refusal: ServiceError | None = None
        try:
            written = self._store.replay_of(bank, chunk.key, None if chunk.if_absent else digest)
        except ServiceError as error:
            refusal = error
        if written is None and refusal is None:
            return None
        if not isinstance(data, Buffer):
            self._engine.objects.discard(data)
        if not self._engine.objects.there(bank.uid):
            raise self._place_missing(bank)
        if refusal is not None:
            raise refusal
        return written

    def _stored(self, bank: Bank, chunk: Chunk, payload: Payload, digest: bytes, data: Buffer | Staged) -> Payload:
        """Make the object of a chunk, durably, and return its descriptor."""
        # What is staged is on the disk already.
        size = len(data) if isinstance(data, Buffer) else 0
        copy, objects = partial(copy_of, chunk, digest), self._engine.objects
        try:
            with self._space_for(size), self._metrics.stages["store"].time():
                self._pauses.reach("object stored")
                if isinstance(data, Buffer):
                    return objects.put(bank.uid, chunk.chunk_id, payload, data, copy)
                with objects.adopt(bank.uid, chunk.chunk_id, payload, data) as adopted:
                    check_bytes(chunk, adopted.data)
                    return adopted.store(copy)
        except (NotThereError, FileNotFoundError, NotADirectoryError) as error:
            raise self._place_missing(bank) from error

    def _place_missing(self, bank: Bank) -> ServiceError:
        """Make the error of a bank whose place of objects is not there: BANK_NOT_FOUND where the bank was deleted since
        the chunk was admitted, otherwise STORAGE_ERROR, because a disk is missing."""
        known = any(known.bank_id == bank.bank_id for known in self._store.known_banks())
        return not_mounted(bank.name) if known else bank_not_found(bank.name)

    def _space_for(self, size: int) -> Reservation:
        try:
            return self._engine.space.for_payload(size)
        finally:
            self._pauses.reach("space reserved")

    def _settled(self, bank: Bank, chunk_id: int, done: "Future[Written]") -> None:
        """Delete the object of a chunk that was refused, or is there already."""
        error = done.exception()
        if isinstance(error, ServiceError) or (error is None and done.result().replayed):
            self._engine.later(partial(self._engine.objects.delete, bank.uid, [chunk_id]))


def _when_all_are_done(futures: "Sequence[Future[Written]]", then: Callable[[], None]) -> None:
    """Call `then` when the last of some futures is done."""
    left, lock = len(futures), threading.Lock()

    def ended(_: "Future[Written]") -> None:
        nonlocal left
        with lock:
            left -= 1
            last = not left
        if last:
            then()

    for future in futures:
        future.add_done_callback(ended)


def _failed(error: Exception) -> "Future[Written]":
    failed: Future[Written] = Future()
    failed.set_exception(error)
    return failed


def _done(written: Written) -> "Future[Written]":
    done: Future[Written] = Future()
    done.set_result(written)
    return done
