"""Payloads that are read from a bucket, through the cache on this machine's disk.

This file owns that no byte is handed on before the whole tensor it belongs to was compared with its checksum, whether
it comes from the bucket or from the cache; that an object counts as damaged or missing only after it was read twice;
and that all readers together have a bounded number of requests under way, and ask for the same bytes once.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import numpy as np
import xxhash

from memory_service.domain import cancellation
from memory_service.domain.model import Payload
from memory_service.observe.seldom import Repeating
from memory_service.storage.base import DamagedError
from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.cache import Key, NewFile, PayloadCache
from memory_service.storage.s3.layout import Layout, key

_log = logging.getLogger(__name__)
_damaged = Repeating()
# Seconds between two looks at whether the caller still waits.
_LOOK_S = 0.25


class ObjectSource:
    """Implements `memory_service.storage.base.Source` for the tensors of a descriptor, all of which were verified and
    lie in a file that is open."""

    __slots__ = ("_descriptor", "_layout")

    def __init__(self, descriptor: int, layout: Layout) -> None:
        self._descriptor, self._layout = descriptor, layout

    def read_at(self, room: memoryview, offset: int) -> int:
        """Fill `room` with the bytes from `offset` of the object on, as far as they are of one run of tensors, and
        return how many there were. Errors: OSError."""
        done = 0
        for first, last, place in self._layout.within(offset, offset + len(room)):
            if first == offset:
                done = read_all(self._descriptor, room[: last - first], place)
        return done

    def close(self) -> None:
        """Close the file for good; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class _Fetch:
    """The reading of one chunk's tensors from the bucket into a file: several requests, the last of which verifies all.

    `done` resolves when the file is whole. `users` are the threads that write the file or want to have it; when it is
    done and they have left, it is closed.
    """

    def __init__(self, key_: Key, payload: Payload, layout: Layout, until: float) -> None:
        self.key, self.payload, self.layout, self.until = key_, payload, layout, until
        self.done: Future[None] = Future()
        self.users = 0
        self.file: NewFile | None = None
        self.header = b""
        # What is wrong with a part that has come.
        self.flaw: Exception | None = None
        # The parts that have not come yet, and how often all of them were asked for.
        self.left = self.tries = 0


class Reads:
    """Reads the objects of a bucket through a cache. Threads share it."""

    def __init__(self, bucket: Bucket, cache: PayloadCache) -> None:
        """Begin the threads that ask the bucket."""
        self._bucket, self._cache, self._limits = bucket, cache, bucket.limits
        self._pool = ThreadPoolExecutor(self._limits.requests, "kvbank-objects")
        self._lock = threading.Lock()
        self._fetches: dict[Key, _Fetch] = {}
        # Payloads that were opened, by where they came from.
        self.cached = self.fetched = 0

    def expect(self, wanted: Iterable[tuple[str, int, Payload]]) -> None:
        """Begin to read what is about to be opened and is not in the cache."""
        for bank_uid, chunk_id, payload in wanted:
            layout = Layout.of(payload)
            name = Key(bank_uid, chunk_id, layout.name)
            if not self._cache.has(name) and self._cache.has_room_for(layout.size):
                self._joined(name, payload, layout, users=0)

    def open(self, bank_uid: str, chunk_id: int, payload: Payload) -> ObjectSource:
        """Open the tensors of a descriptor, all verified. Errors: DamagedError, FileNotFoundError, OSError,
        Cancelled."""
        layout = Layout.of(payload)
        name = Key(bank_uid, chunk_id, layout.name)
        if (source := self._cached(name, payload, layout)) is not None:
            with self._lock:
                self.cached += 1
            return source
        fetch = self._joined(name, payload, layout, users=1)
        try:
            _wait(fetch.done)
            assert fetch.file is not None
            with self._lock:
                self.fetched += 1
            return ObjectSource(os.dup(fetch.file.descriptor), layout)
        finally:
            self._leave(fetch)

    def close(self) -> None:
        """End what is under way, and wait for it."""
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            left = list(self._fetches.values())
        for fetch in left:
            with self._using(fetch):
                self._end(fetch, _stopped())

    # The cache

    def _cached(self, name: Key, payload: Payload, layout: Layout) -> ObjectSource | None:
        """Open what the cache has, if it has it and it is whole."""
        if (descriptor := self._cache.open(name)) is None:
            return None
        source = ObjectSource(descriptor, layout)
        with suppress(DamagedError, OSError):
            _verify(descriptor, payload, layout)
            return source
        source.close()
        self._cache.drop(name)
        if _damaged.due("cache"):
            _log.warning("a file of the cache is damaged, that of chunk %d; it is read from the bucket", name.chunk_id)
        return None

    # The bucket

    def _joined(self, name: Key, payload: Payload, layout: Layout, users: int) -> _Fetch:
        """Return the reading of these bytes that is under way, or begin one. users: how many of this call there are."""
        with self._lock:
            fetch = self._fetches.get(name)
            if new := fetch is None:
                until = time.monotonic() + self._limits.patience_s + layout.size / 2**20
                fetch = self._fetches[name] = _Fetch(name, payload, layout, until)
            fetch.users += users
        if new:
            with self._using(fetch):
                self._submit(self._begin, fetch)
        return fetch

    def _submit(self, work: Callable[..., None], *arguments: object) -> None:
        """Let a thread do some work. Errors: OSError, where the reading has ended."""
        try:
            self._pool.submit(work, *arguments)
        except RuntimeError as error:
            raise _stopped() from error

    @contextmanager
    def _using(self, fetch: _Fetch) -> Iterator[None]:
        """Keep the file of a reading open while the block writes it; what the block raises ends the reading."""
        with self._lock:
            fetch.users += 1
        try:
            yield
        except BaseException as error:
            self._end(fetch, error)
        finally:
            self._leave(fetch)

    def _leave(self, fetch: _Fetch) -> None:
        """Count a user less, the last of whom closes the file."""
        with self._lock:
            fetch.users -= 1
            last = not fetch.users and fetch.done.done()
        if last and fetch.file is not None:
            fetch.file.close()

    def _begin(self, fetch: _Fetch) -> None:
        """Ask for all parts of an object, the first of them in this thread."""
        with self._using(fetch):
            if time.monotonic() > fetch.until + self._limits.request_s:
                # Many wait for a bucket that hangs; whoever has waited so long is gone.
                raise TimeoutError(errno.ETIMEDOUT, f"{self._bucket.location} does not answer in time")
            fetch.file = fetch.file or self._cache.begin(fetch.key, fetch.layout.size)
            first, *others = fetch.layout.requests(self._limits)
            fetch.left = 1 + len(others)
            for part in others:
                self._submit(self._read, fetch, *part)
            self._read(fetch, *first)

    def _read(self, fetch: _Fetch, begin: int, end: int) -> None:
        """Read one part of an object into the file; the last one to come verifies the whole."""
        with self._using(fetch):
            if fetch.done.done():
                return
            try:
                self._copy(fetch, begin, end)
            except (DamagedError, FileNotFoundError) as error:
                fetch.flaw = error
            with self._lock:
                fetch.left -= 1
                last = not fetch.left
            if last:
                self._finish(fetch)

    def _copy(self, fetch: _Fetch, begin: int, end: int) -> None:
        name = key(fetch.key.bank_uid, fetch.key.chunk_id)
        data, size = self._bucket.read(name, begin, end, fetch.until)
        if size != fetch.payload.file_length:
            raise DamagedError(f"it is no object of {fetch.payload.file_length} bytes, but of {size}")
        if not begin:
            fetch.header = bytes(data[: fetch.layout.header_length])
        assert fetch.file is not None
        for first, last, place in fetch.layout.within(begin, end):
            _write_all(fetch.file.descriptor, data[first - begin : last - begin], place)

    def _finish(self, fetch: _Fetch) -> None:
        """Verify what was read, and let the cache have it; what is not there or does not match is read once more."""
        assert fetch.file is not None
        fetch.tries += 1
        try:
            self._check(fetch)
        except (DamagedError, FileNotFoundError):
            if fetch.tries > 1:
                raise
            # A byte may have changed on the way, or an answer may have been an old one.
            fetch.flaw = None
            self._begin(fetch)
            return
        fetch.file.keep()
        self._end(fetch, None)

    def _check(self, fetch: _Fetch) -> None:
        """Verify what was read. Errors: DamagedError, FileNotFoundError."""
        if fetch.flaw is not None:
            raise fetch.flaw
        payload = fetch.payload
        if payload.header_checksum not in (None, xxhash.xxh3_64_intdigest(fetch.header, payload.seed)):
            raise DamagedError("its header does not match its checksum")
        assert fetch.file is not None
        _verify(fetch.file.descriptor, payload, fetch.layout)

    def _end(self, fetch: _Fetch, error: BaseException | None) -> None:
        """Tell the users that the file is whole, or what has failed."""
        with self._lock:
            if fetch.done.done():
                return
            del self._fetches[fetch.key]
            if error is None:
                fetch.done.set_result(None)
            else:
                fetch.done.set_exception(error)


def _stopped() -> OSError:
    return OSError(errno.ESHUTDOWN, "the service stops")


def _wait(done: Future[None]) -> None:
    """Wait until a reading has ended, or the caller has gone. Errors: those of the reading, Cancelled."""
    while not done.done():
        cancellation.check()
        wait([done], _LOOK_S)
    return done.result()


def _verify(descriptor: int, payload: Payload, layout: Layout) -> None:
    """Compare all tensors in a file with their checksums. Errors: DamagedError, OSError."""
    room = np.empty(max((tensor.length for tensor in payload.tensors), default=0), np.uint8).data
    for tensor in payload.tensors:
        part = room[: tensor.length]
        whole = not part or read_all(descriptor, part, layout.place_of(tensor)) == len(part)
        if not whole or xxhash.xxh3_64_intdigest(part, payload.seed) != tensor.checksum:
            raise DamagedError(f"tensor {tensor.name} does not match its checksum")


def read_all(descriptor: int, room: memoryview, offset: int) -> int:
    """Fill `room` with the bytes of a file from `offset` on, and return how many there were. Errors: OSError."""
    done = 0
    while done < len(room) and (count := os.preadv(descriptor, [room[done:]], offset + done)):
        done += count
    return done


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
