"""A bucket of S3, or of what speaks like it: objects that are made once, read by ranges, listed and deleted.

This file owns that a request which failed in passing is made again until a deadline, and that an object is not written
over unless a caller wants that: where a key is taken, its bytes are compared, because the first try of a request may
have succeeded though its answer was lost. Credentials, region and endpoint are those of the usual variables
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL); AWS_CA_BUNDLE is a file of
authorities (PEM) that are trusted beside those of the machine.
"""

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import obstore
import obstore.exceptions
from obstore.exceptions import AlreadyExistsError, PreconditionError
from obstore.store import S3Store

from memory_service.domain import cancellation
from memory_service.domain.errors import StartError
from memory_service.domain.limits import OBJECTS, ObjectLimits
from memory_service.domain.payload import Buffer
from memory_service.storage.s3 import failures
from memory_service.storage.s3.location import Location

T = TypeVar("T")
_log = logging.getLogger(__name__)
_MIB = 1024 * 1024
# Objects of one request to list or to delete.
_PAGE = 1000
# The most bytes of an object that one request makes.
_LARGEST = 5 * 1024 * _MIB
_FAILURES = (obstore.exceptions.BaseError, failures.Passing)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class Listed(NamedTuple):
    """An object as a listing tells it. `modified`: when it was made, by the clock of the store."""

    key: str
    size: int
    modified: datetime


class Part(NamedTuple):
    """Bytes of an object, and how many the whole object has."""

    data: memoryview
    size: int


class Bucket:
    """Objects below one prefix of a bucket. Threads share it, and its methods block. Errors of all methods: OSError,
    among them PermissionError for credentials that are refused; Cancelled, when the caller of the thread has gone."""

    def __init__(self, location: Location, limits: ObjectLimits = OBJECTS, endpoint: str = "") -> None:
        """Speak to the bucket of a location; nothing is asked yet. endpoint: the URL of the service, that of the
        environment where it is empty. Errors: StartError."""
        self.location = location
        self.limits = limits
        self._endpoint = endpoint or next(filter(None, map(os.environ.get, _ENDPOINTS)), "")
        self._options: dict[str, object] = {"allow_http": self._endpoint.startswith("http://"), **_authorities()}
        self._closed = threading.Event()
        # Requests that were made again; the lock is for counting them.
        self.repeated, self._lock = 0, threading.Lock()
        # By the binary size of what is sent, since a request may take as long as its bytes do.
        self._stores: dict[int, S3Store] = {}
        try:
            _check(self._endpoint)
            self._store(0)
        except (ValueError, obstore.exceptions.BaseError) as error:
            text = str(error).partition("\n")[0]
            raise StartError(f"what the environment says of {location} cannot be used: {text}") from None

    def close(self) -> None:
        """Let no request be made again from now on."""
        self._closed.set()

    # Writing

    def put_new(self, key: str, parts: Sequence[Buffer]) -> None:
        """Make an object of the parts, durably. Where the key is taken, nothing is written, and the bytes that are
        there must be the same. Errors: FileExistsError where they are others."""
        size = sum(map(len, parts))
        self._check_size(size)

        def attempt() -> None:
            try:
                obstore.put(self._store(size), key, parts, mode="create")
            except AlreadyExistsError:
                # Taken, or about to be taken by another request (409), of which nothing may come.
                if not self._agrees(key, parts, size):
                    raise failures.Taken from None

        self._repeated(attempt, size)

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """Make an object of the parts, in place of one that is there."""
        size = sum(map(len, parts))
        self._check_size(size)
        self._repeated(lambda: obstore.put(self._store(size), key, parts, use_multipart=False), size)

    def replace(self, key: str, data: bytes, before: bytes | None) -> None:
        """Make an object in place of the one that has the bytes `before`, None for none, unless another one is there by
        then. A service that does not know If-Match may write over one that comes at the same moment. Errors:
        FileExistsError where another one is there, FileNotFoundError where none is."""
        if before is None:
            self.put_new(key, [data])
            return
        size = max(len(before), len(data))
        self._check_size(size)

        def attempt() -> None:
            found = obstore.get(self._store(size), key)
            there = bytes(found.bytes())
            if there == data:  # by the first try, whose answer was lost
                return
            if there != before:
                raise self._taken(key)
            try:
                obstore.put(self._store(size), key, data, mode={"e_tag": found.meta["e_tag"]})
            except (PreconditionError, AlreadyExistsError):
                raise failures.Taken from None

        self._repeated(attempt, size)

    def _taken(self, key: str) -> FileExistsError:
        return FileExistsError(errno.EEXIST, f"{self.location} has another object of this name", key)

    def _agrees(self, key: str, parts: Sequence[Buffer], size: int) -> bool:
        """Tell whether an object is there, which must have the bytes of the parts. Errors: FileExistsError."""
        begin = 0
        try:
            if self.size(key) != size:
                raise self._taken(key)
            for part in parts:
                view = memoryview(part).cast("B")
                for at in range(0, len(view), self.limits.part_bytes):
                    piece = view[at : at + self.limits.part_bytes]
                    if self.read(key, begin, begin + len(piece)).data != piece:
                        raise self._taken(key)
                    begin += len(piece)
        except FileNotFoundError:
            return False
        return True

    def _check_size(self, size: int) -> None:
        if size > _LARGEST:
            raise OSError(errno.EFBIG, f"{self.location} takes no object of {size} bytes")

    # Reading

    def read(self, key: str, begin: int, end: int, until: float | None = None) -> Part:
        """Read the bytes of an object from `begin` on and before `end`, fewer where the object ends before. until: the
        time (monotonic) after which nothing is tried again. Errors: FileNotFoundError."""

        def attempt() -> Part:
            try:
                found = obstore.get(self._store(end - begin), key, options={"range": (begin, end)})
                size, data = found.meta["size"], memoryview(found.bytes())
            except obstore.exceptions.GenericError as error:
                if not failures.behind_the_end(error):
                    raise
                return Part(memoryview(b""), self.size(key) if begin else 0)
            if len(data) != min(end, size) - begin:
                raise failures.Short
            return Part(data, size)

        return self._repeated(attempt, end - begin, until)

    def whole(self, key: str) -> bytes:
        """Read all of an object, in parts where it is large. Errors: FileNotFoundError."""
        step = self.limits.part_bytes
        part = self.read(key, 0, step)
        parts, done = [part.data], len(part.data)
        while done < part.size:
            parts.append(self.read(key, done, min(done + step, part.size)).data)
            if not parts[-1]:
                raise FileNotFoundError(errno.ENOENT, f"{self.location} has another object now", key)
            done += len(parts[-1])
        return b"".join(parts)

    def size(self, key: str) -> int:
        """Return the bytes of an object. Errors: FileNotFoundError."""
        # The answer to a HEAD would not say whether the object or its bucket is missing.
        return self.read(key, 0, 1).size

    def pages(self, prefix: str, after: str = "") -> Iterator[Sequence[Listed]]:
        """Yield the objects whose keys are below a prefix (a whole number of segments), ascending by key, from the
        first one after the key `after`, in pages of up to 1000."""
        while page := self._repeated(partial(self._page, prefix, after)):
            yield page
            after = page[-1].key

    def _page(self, prefix: str, after: str) -> Sequence[Listed]:
        stream = obstore.list(self._store(0), prefix, offset=after or None, chunk_size=_PAGE)
        found = next(iter(stream), ())
        return [Listed(item["path"], item["size"], item["last_modified"]) for item in found]

    # Deleting

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the objects of these keys; those that are not there are passed over."""
        keys = iter(keys)
        while batch := list(islice(keys, _PAGE)):
            self._repeated(partial(obstore.delete, self._store(0), batch))

    # Requests

    def _store(self, size: int) -> S3Store:
        """Return the client for requests that send or fetch so many bytes."""
        kind = (size // _MIB).bit_length()
        if (store := self._stores.get(kind)) is None:
            seconds = self.limits.request_s + ((1 << kind) - 1)
            given = {"endpoint": self._endpoint} if self._endpoint else {}
            bucket, prefix = self.location
            store = S3Store(
                bucket,
                prefix=prefix or None,
                client_options={**self._options, "timeout": timedelta(seconds=seconds)},  # type: ignore[arg-type]
                # Requests are repeated here, where it is known which of them may be.
                retry_config={"max_retries": 0},
                **given,  # type: ignore[arg-type]
            )
            self._stores[kind] = store
        return store

    def _failure(self, error: Exception) -> OSError:
        """Return the error for what is above. The store's own words, which have pages, are only for debugging."""
        _log.debug("%s: %s", self.location, error)
        return failures.failure(self.location, error)

    def _repeated(self, attempt: Callable[[], T], size: int = 0, until: float | None = None) -> T:
        """Return what an attempt returns, which is made again while its failures are such as pass."""
        if until is None:
            until = time.monotonic() + self.limits.patience_s + size / _MIB
        pause = self.limits.first_pause_s
        while True:
            cancellation.check()
            try:
                return attempt()
            except OSError as error:
                # Of an attempt's own requests, which have been repeated; those of the library have no number.
                if error.errno:
                    raise
                raise self._failure(error) from None
            except _FAILURES as error:
                late = self._closed.is_set() or time.monotonic() + pause > until
                if late or not failures.passes(error):
                    raise self._failure(error) from None
            except BaseException as error:
                # The library panics at some answers that it does not expect; its error is no Exception.
                if type(error).__name__ == "PanicException":
                    raise OSError(errno.EIO, f"{self.location} answers what is no answer") from error
                raise
            with self._lock:
                self.repeated += 1
            # Half of it by chance, so that those that failed together do not come again together.
            self._closed.wait(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, self.limits.longest_pause_s)


def _check(endpoint: str) -> None:
    """Refuse an endpoint at which the library would fail with each request. Errors: ValueError."""
    parts = urlsplit(endpoint)
    if endpoint and not (parts.scheme in ("http", "https") and parts.hostname):
        raise ValueError(f"{endpoint!r} is no endpoint, which is https://HOST or http://HOST:PORT")


def _authorities() -> dict[str, object]:
    """Return the option of the library for authorities that the environment names. Errors: StartError."""
    if not (file := os.environ.get("AWS_CA_BUNDLE")):
        return {}
    try:
        return {"root_certificate": Path(file).read_bytes()}
    except OSError as error:
        raise StartError(f"cannot read AWS_CA_BUNDLE {file}: {error.strerror}") from error
