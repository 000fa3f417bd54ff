"""Payload files of a server on this machine are read here, and staged for it.

This file owns what is believed of the names in answers of such a server: they open nothing but payload files of its
folder, every tensor that is read is verified, and the server is not told which of the files could not be read.
"""

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

import numpy as np
import numpy.typing as npt

from kvbank._calls import tensors as _tensors
from kvbank._calls.answers import understood
from kvbank._calls.reading import Answer
from kvbank._exceptions import DataLoss
from kvbank._transport.folder import Folder
from kvbank.v1 import chunk_pb2, service_pb2
from kvbank.wire import proof as _proof

# The bank's uid, the low byte of the id, the id.
_PAYLOAD = re.compile(r"payloads/[0-9a-f]{16}/(?P<shard>[0-9a-f]{2})/(?P<id>[1-9][0-9]{0,18})\.safetensors")
_PAGE = 4096
# The server takes a file whose tensors begin within its first MiB.
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
        """Return the bytes that show the server that this client has read the nonce."""
        return _proof.of_client(self.nonce)

    def same(self, other: "SameHost | None") -> bool:
        """Tell whether both are one folder of one start of a server."""
        return other is not None and self.nonce == other.nonce and self.folder.same(other.folder)

    def read(self, name: str, chunk: chunk_pb2.Chunk) -> _tensors.Payload:
        """Return the verified tensors of a chunk out of the file of this name.

        Errors: OSError where the file cannot be read or is none of this chunk's; DataLoss where its bytes are damaged.
        """
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

    @understood()
    def fill(self, answer: Answer) -> None:
        """Read the tensors of an answer from the files that it names; it is not `complete` where one cannot be read.

        All tensors are then asked for over the stream: a server that learned which file it was could find out in this
        way what is in a file. Errors: Internal for an answer that makes no sense.
        """
        names = answer.named()
        try:
            for chunk in answer.wanted():
                stored = chunk.HasField("payload")
                payload = self.read(names[chunk.chunk_id], chunk) if stored else _tensors.Payload(chunk)
                answer.tensors[chunk.chunk_id] = payload.tensors()
        except (OSError, DataLoss):
            answer.complete = False

    def stage(self, buffers: Sequence[memoryview], about: int = 0) -> service_pb2.StagedPayload | None:
        """Write the tensors of a chunk to a file for the server to take over; return None where that cannot be.

        about: bytes of the chunk's other fields, of which the server writes a copy into the file's header.
        """
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


def _header(descriptor: int, chunk: chunk_pb2.Chunk) -> bytes:
    """Return the bytes that stand before the tensors in a payload file. Errors: OSError for a length that is odd."""
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


def _runs(payload: _tensors.Payload) -> Iterator[tuple[int, list[memoryview]]]:
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
    """Move the bytes of all buffers by as many calls as it takes, since a call may move less than it was asked to.

    move: takes buffers and the offset in the file, and returns how many bytes it moved.
    Errors: OSError where a call moves none.
    """
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
    """Return how many bytes to leave for the header of a safetensors file, which are whole pages.

    tensors: their number. about: bytes of the chunk's other fields, of which the header has a copy, unless that would
    take too much room.
    """
    least, copy = 256 + 192 * tensors, 1024 + 2 * about
    return -(-(least + copy if least + copy <= _LARGEST_ROOM else least) // _PAGE) * _PAGE
