"""Payload files of a server on this machine are read here, and staged for it.

This file owns what is believed of such a server: that it knows what is in a file which only this user can read, once
it has proven that, and nothing more. Names in its answers open nothing but payload files of its folder, every tensor
that is read is verified, and the server is not told which of them could not be read.
"""

import hmac
import mmap
import os
import re
import stat
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from kvbank._calls import tensors as _tensors
from kvbank._exceptions import DeadlineExceeded
from kvbank._transport import status
from kvbank._transport.folder import Folder, plain
from kvbank.v1 import chunk_pb2, direct_pb2, service_pb2
from kvbank.wire import proof as _proof
from kvbank.wire.local_socket import Direct

_NONCE_FILE, _LARGEST_NONCE = "same-host.nonce", 1024
# The bank's uid, the low byte of the id, the id.
_PAYLOAD = re.compile(r"payloads/[0-9a-f]{16}/(?P<shard>[0-9a-f]{2})/(?P<id>[1-9][0-9]{0,18})\.safetensors")
_PAGE = 4096
# Of what the server takes.
_LARGEST_ROOM = (1 << 20) - _PAGE
_MOST_BUFFERS = 512
# Python keeps a descriptor open for each mapping.
_MOST_MAPPED = 256
_free = threading.BoundedSemaphore(_MOST_MAPPED)


@dataclass(frozen=True, slots=True, eq=False)
class SameHost:
    """A data folder that this process shares with its server."""

    folder: Folder
    staging: str
    nonce: bytes
    # For direct calls; empty where there is none.
    socket: str = ""
    # Whether tensors are views of the files, instead of copies.
    mapped: bool = False

    @property
    def proof(self) -> bytes:
        """The bytes that show the server that this client has read the nonce."""
        return _proof.of_client(self.nonce)

    def same(self, other: "SameHost | None") -> bool:
        """Whether both are one folder of one start of a server."""
        return other is not None and self.nonce == other.nonce and self.folder.same(other.folder)

    def read(self, name: str, chunk: chunk_pb2.Chunk) -> "_tensors.Payload":
        """The chunk's tensors out of a file, no others, verified. OSError when that cannot be, DataLoss."""
        match = _PAYLOAD.fullmatch(name)
        if match is None or int(match["id"]) != chunk.chunk_id or int(match["shard"], 16) != chunk.chunk_id & 0xFF:
            raise OSError(f"{name!r} is not the name of the payload of chunk {chunk.chunk_id}")
        with self.folder.opened(name) as descriptor:
            found, length = os.fstat(descriptor), chunk.payload.file_length
            if not stat.S_ISREG(found.st_mode) or found.st_size != length:
                raise OSError(f"{name} is no file of {length} bytes")
            _tensors.verify_header(chunk, _header(descriptor, chunk))
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

    def stage(self, buffers: Sequence[memoryview], about: int = 0) -> service_pb2.StagedPayload | None:
        """Write the tensors of a chunk to a file for the server to take over; None where that cannot be. `about`: bytes
        of what else is said of the chunk, of which the server writes a copy into the file's header."""
        name, offset = uuid.uuid4().hex, _room(len(buffers), about)
        try:
            descriptor = self.folder.created(f"{self.staging}/{name}")
            try:
                _write(descriptor, buffers, offset)
            finally:
                os.close(descriptor)
        except OSError:
            self.unstage(name)
            return None
        return service_pb2.StagedPayload(name=name, offset=offset, proof=self.proof)

    def unstage(self, name: str) -> None:
        """Remove a staged file, if the server has not taken it."""
        try:
            self.folder.removed(f"{self.staging}/{name}")
        except OSError:
            return


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
        """Tell whether the server is to be asked by GetServerInfo."""
        return self._unknown

    @staticmethod
    def question() -> service_pb2.GetServerInfoRequest:
        """Make the request that lets the server prove that it knows the nonce."""
        return service_pb2.GetServerInfoRequest(challenge=_proof.challenge())

    def learn(self, asked: service_pb2.GetServerInfoRequest, info: service_pb2.GetServerInfoResponse) -> None:
        """Take the path where the server has proven that it is the one of the folder that it names."""
        path = _proven(info.same_host, asked.challenge, self._mapped) if info.HasField("same_host") else None
        path = None if path is None or path.same(self._refused) else path
        if path is None or not path.same(self.path):
            self.close()
            self._direct = Direct(path.folder.reached(path.socket), path.folder) if path and path.socket else None
            self.path = path
        self._unknown = False

    def ignored(self, path: SameHost) -> None:
        """Note that the server did not take the proof of `path`: it is another server since, or shares nothing any
        more."""
        self._refused, self._unknown = path, True

    def doubted(self) -> None:
        """Note that the server did not take a staged file: it may be another server since, and is to be asked again."""
        self._unknown = self.path is not None

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
            raise status.from_status(answer.error, request_id)
        return getattr(answer, field) if answer.HasField(field) else None

    def close(self) -> None:
        """End the connections for direct calls."""
        if self._direct is not None:
            self._direct.close()


def _proven(info: service_pb2.SameHost, challenge: bytes, mapped: bool) -> SameHost | None:
    """Return the folder that a server names, None where it has not proven that it knows what is in the nonce file,
    which must belong to this user and be open to nobody else."""
    if info.nonce_file != _NONCE_FILE or not info.path.startswith(b"/"):
        return None
    try:
        folder = Folder(info.path)
        with folder.opened(_NONCE_FILE) as descriptor:
            found = os.fstat(descriptor)
            own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
            if not own or stat.S_IMODE(found.st_mode) & 0o077:
                return None
            nonce = os.read(descriptor, _LARGEST_NONCE)
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return None
    if not nonce or not hmac.compare_digest(info.proof, _proof.of_server(nonce, challenge, info)):
        return None
    if not plain(info.staging):
        return None
    return SameHost(folder, info.staging, nonce, info.socket if plain(info.socket) else "", mapped)


def _header(descriptor: int, chunk: chunk_pb2.Chunk) -> bytes:
    """Read what stands before the tensors in a file of a good length."""
    if not 0 <= chunk.payload.header_length <= chunk.payload.file_length:
        raise OSError(f"a header of {chunk.payload.header_length} bytes is none")
    return os.pread(descriptor, chunk.payload.header_length, 0)


def _mapping(descriptor: int, length: int) -> npt.NDArray[np.uint8] | None:
    """Map a file into memory as long as something refers to it; None where too many are mapped."""
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
    """Yield runs of neighbouring tensors: where a run begins in the file, and the places for its bytes."""
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


def _room(tensors: int, about: int) -> int:
    """Return how many bytes to leave for the header of a safetensors file: more than it takes, in whole pages; without
    room for the copy of what is said of a chunk, where that would take too much."""
    least, copy = 256 + 192 * tensors, 1024 + 2 * about
    return -(-(least + copy if least + copy <= _LARGEST_ROOM else least) // _PAGE) * _PAGE
