"""Payload files of a server on this machine: read, and staged for it.

This file owns what is believed of such a server: that it can write a file which only this user can read, and nothing
more. Names in its answers open nothing outside of its folder, and every tensor that is read is verified.
"""

import mmap
import os
import stat
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from kvbank import _status, _tensors
from kvbank._direct import Direct
from kvbank._exceptions import DeadlineExceeded
from kvbank.v1 import chunk_pb2, direct_pb2, service_pb2

_NONCE_FILE, _LARGEST_NONCE = "same-host.nonce", 1024
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PAGE = 4096
_MOST_BUFFERS = 512
# Python keeps a descriptor open for each mapping.
_MOST_MAPPED = 256
_free = threading.BoundedSemaphore(_MOST_MAPPED)


@dataclass(frozen=True, slots=True)
class SameHost:
    """A data folder that this process shares with its server."""

    root: str
    staging: str
    nonce: bytes
    # For direct calls; empty where there is none.
    socket: str = ""
    # Whether tensors are views of the files, instead of copies.
    mapped: bool = False

    def read(self, name: str, chunk: chunk_pb2.Chunk) -> "_tensors.Payload":
        """The chunk's tensors out of a file, no others, verified. OSError when that cannot be, DataLoss."""
        with _opened(self.root, name) as descriptor:
            found, length = os.fstat(descriptor), chunk.payload.file_length
            if not stat.S_ISREG(found.st_mode) or found.st_size != length:
                raise OSError(f"{name} is no file of {length} bytes")
            _tensors.verify_header(chunk, os.pread(descriptor, chunk.payload.header_length, 0))
            mapping = _mapping(descriptor, length) if self.mapped else None
            if mapping is not None:
                payload = _tensors.Payload(chunk, mapping)
            else:
                payload = _tensors.Payload(chunk)
                for offset, views in _runs(payload):
                    _read(descriptor, views, offset)
        for index in range(len(payload.views)):
            payload.verify(index)
        return payload

    def stage(self, buffers: Sequence[memoryview]) -> service_pb2.StagedPayload | None:
        """Write the tensors of a chunk to a file for the server to take over; None where that cannot be."""
        name, offset = uuid.uuid4().hex, _room(len(buffers))
        try:
            descriptor = os.open(self._staged(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _write(descriptor, buffers, offset)
            finally:
                os.close(descriptor)
        except OSError:
            self.unstage(name)
            return None
        return service_pb2.StagedPayload(name=name, offset=offset, nonce=self.nonce)

    def unstage(self, name: str) -> None:
        """Remove a staged file, if the server has not taken it."""
        try:
            os.unlink(self._staged(name))
        except OSError:
            return

    def _staged(self, name: str) -> str:
        return os.path.join(self.root, self.staging, name)


class Sharing:
    """What a client knows of the same-host path to its server."""

    def __init__(self, address: str, mapped: bool = False) -> None:
        self._mapped = mapped
        self.path: SameHost | None = None
        self._direct: Direct | None = None
        self._refused: SameHost | None = None
        # Only a unix socket says that the server is on this machine.
        self._unknown = address.startswith("unix:")

    def unknown(self) -> bool:
        """Whether GetServerInfo should be asked."""
        return self._unknown

    def learn(self, info: service_pb2.GetServerInfoResponse) -> None:
        """Take the path where the nonce can be read."""
        path = _proven(info.same_host, self._mapped) if info.HasField("same_host") else None
        path = None if path == self._refused else path
        if path != self.path:
            self.close()
            self._direct = Direct(os.path.join(path.root, path.socket)) if path and path.socket else None
        self.path, self._unknown = path, False

    def ignored(self, path: SameHost) -> None:
        """The server did not take the nonce of `path`: it is another one since, or will not."""
        self._refused, self._unknown = path, True

    def ask(self, request: Any, timeout: float, request_id: str) -> Any:
        """The answer of a direct call; None where it cannot be had so, and gRPC is to be asked. ServiceError."""
        if (direct := self._direct) is None:
            return None
        field = "retrieve" if isinstance(request, service_pb2.RetrieveFilesRequest) else "fetch"
        try:
            answer = direct.call(direct_pb2.DirectRequest(request_id=request_id, **{field: request}), timeout)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout:.3g} s", code="DEADLINE_EXCEEDED") from None
        except (OSError, DecodeError):
            return None
        if answer.HasField("error"):
            raise _status.from_status(answer.error, request_id)
        return getattr(answer, field) if answer.HasField(field) else None

    def close(self) -> None:
        """End the connections for direct calls."""
        if self._direct is not None:
            self._direct.close()


def _proven(info: service_pb2.SameHost, mapped: bool) -> SameHost | None:
    """None unless the nonce file is this user's own, and no other file of his: what is in it goes to the server."""
    if info.nonce_file != _NONCE_FILE:
        return None
    try:
        with _opened(info.root, info.nonce_file) as descriptor:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
                return None
            nonce = os.read(descriptor, _LARGEST_NONCE)
    except OSError:
        return None
    if not nonce or not _plain(info.staging):
        return None
    return SameHost(info.root, info.staging, nonce, info.socket if _plain(info.socket) else "", mapped)


def _plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


@contextmanager
def _opened(root: str, name: str) -> Any:
    """A file below `root`, opened without following a link anywhere below it."""
    *folders, last = name.split("/")
    if not all(map(_plain, (*folders, last))):
        raise OSError(f"{name!r} is not a relative name")
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in (*folders, last):
            flags = _FILE if part is last else _FILE | os.O_DIRECTORY
            parent, descriptor = descriptor, os.open(part, flags, dir_fd=descriptor)
            os.close(parent)
        yield descriptor
    finally:
        os.close(descriptor)


def _mapping(descriptor: int, length: int) -> npt.NDArray[np.uint8] | None:
    """A file, in its own memory, as long as something refers to it; None where there are too many."""
    if not _free.acquire(blocking=False):
        return None
    try:
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_POPULATE", 0)
        mapping = mmap.mmap(descriptor, length, flags, mmap.PROT_READ)
    except BaseException:
        _free.release()
        raise
    weakref.finalize(mapping, _free.release)
    return np.frombuffer(mapping, np.uint8)


def _runs(payload: "_tensors.Payload") -> Iterator[tuple[int, list[memoryview]]]:
    """Neighbouring tensors: where they begin in the file, and the places for their bytes."""
    run: list[memoryview] = []
    begin = end = 0
    for tensor, view in zip(payload.descriptors, payload.views, strict=True):
        if run and tensor.offset != end:
            yield begin, run
            run = []
        if not run:
            begin = tensor.offset
        run.append(view)
        end = tensor.offset + tensor.length
    if run:
        yield begin, run


def _read(descriptor: int, views: Sequence[memoryview], offset: int) -> None:
    _each(views, offset, partial(os.preadv, descriptor))


def _write(descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    _each(buffers, offset, partial(os.pwritev, descriptor))


def _each(buffers: Sequence[memoryview], offset: int, move: Callable[[Sequence[memoryview], int], int]) -> None:
    """Move all of them; a call may move less than it was asked to. OSError where one moves nothing."""
    left = [buffer for buffer in buffers if buffer]
    while left:
        count = move(left[:_MOST_BUFFERS], offset)
        if not count:
            raise OSError("a payload file became shorter")
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


def _room(tensors: int) -> int:
    """For the header of a safetensors file: more than it takes, in whole pages."""
    return -(-(256 + 192 * tensors) // _PAGE) * _PAGE
