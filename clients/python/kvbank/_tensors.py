"""Tensors: numpy arrays to bytes with checksums, and received bytes back to verified arrays.

This file owns the rule that no byte of a tensor reaches a caller before its checksum was compared.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash

from kvbank._exceptions import DataLoss, InvalidArgument
from kvbank._models import Array
from kvbank.v1 import bank_pb2, chunk_pb2

FRAME_BYTES = 1 << 20

DTYPES: dict[int, np.dtype[Any]] = {
    bank_pb2.DATA_TYPE_BF16: np.dtype(ml_dtypes.bfloat16),
    bank_pb2.DATA_TYPE_FP16: np.dtype("<f2"),
    bank_pb2.DATA_TYPE_FP32: np.dtype("<f4"),
    bank_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
}
_BY_DTYPE = {dtype: number for number, dtype in DTYPES.items()}


def as_embedding(values: npt.ArrayLike, ndim: int) -> npt.NDArray[np.float32]:
    """Finite little-endian float32, contiguous, of `ndim` dimensions; one query may stand for a list of one."""
    try:
        array = np.ascontiguousarray(values, dtype="<f4")
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"not an array of numbers: {error}", reason="INVALID_FIELD") from None
    if ndim == 2 and array.ndim == 1:
        array = array[np.newaxis]
    if array.ndim != ndim or array.size == 0:
        raise InvalidArgument(f"expected {ndim} dimensions and not empty, got {array.shape}", reason="INVALID_FIELD")
    if not np.isfinite(array).all():
        raise InvalidArgument("NaN or Inf in an embedding", reason="NOT_FINITE")
    return array


def describe(name: str, array: Array) -> tuple[chunk_pb2.TensorDescriptor, memoryview]:
    """The descriptor of a tensor for a write, and its bytes; copies only what is not contiguous."""
    number = _BY_DTYPE.get(array.dtype) if isinstance(array, np.ndarray) else None
    if number is None:
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        message = f"tensor {name!r} is {found}; expected a numpy array of bfloat16, float16, float32 or int32"
        raise InvalidArgument(message, reason="TENSOR_MISMATCH", metadata={"tensor": name})
    shape = array.shape
    view = _byte_view(np.ascontiguousarray(array))
    checksum = xxhash.xxh3_64_intdigest(view)
    descriptor = chunk_pb2.TensorDescriptor(name=name, dtype=number, shape=shape, length=len(view), checksum=checksum)  # type: ignore[arg-type]
    return descriptor, view


def frames(buffers: Sequence[memoryview]) -> Iterator[bytes]:
    """The bytes of `buffers`, one after the other, in pieces of `FRAME_BYTES`."""
    pieces: list[memoryview] = []
    room = FRAME_BYTES
    for buffer in buffers:
        start = 0
        while start < len(buffer):
            piece = buffer[start : start + room]
            pieces.append(piece)
            start += len(piece)
            room -= len(piece)
            if room == 0:
                yield b"".join(pieces)
                pieces, room = [], FRAME_BYTES
    if pieces:
        yield b"".join(pieces)


class PayloadReader:
    """Fills the tensors of payloads from a stream of bytes whose frames need not end where a tensor ends."""

    def __init__(self, chunks: Sequence[chunk_pb2.Chunk]) -> None:
        """chunks: those whose bytes follow, in that order."""
        self.tensors: dict[int, dict[str, Array]] = {chunk.chunk_id: {} for chunk in chunks}
        self._todo = _tensors_of(chunks)
        self._next()

    def feed(self, data: bytes) -> None:
        """Take one frame; DataLoss when a tensor is complete and differs from its checksum."""
        rest = memoryview(data)
        while rest:
            if self._current is None:
                raise DataLoss("the server sent more bytes than it announced")
            part = rest[: len(self._view) - self._filled]
            self._view[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            self._complete()

    def finish(self) -> None:
        """DataLoss when bytes are missing."""
        if self._current is not None:
            chunk, tensor = self._current
            raise _damaged(chunk, tensor, "ended early")

    def _next(self) -> None:
        """Make room for the next tensor; those without bytes are complete at once."""
        self._current = next(self._todo, None)
        if self._current is None:
            return
        _, tensor = self._current
        self._buffer = np.empty(tensor.length, np.uint8)
        self._view = self._buffer.data
        self._filled = 0
        self._complete()

    def _complete(self) -> None:
        if self._current is None or self._filled < len(self._view):
            return
        chunk, tensor = self._current
        if xxhash.xxh3_64_intdigest(self._view, seed=chunk.payload.seed) != tensor.checksum:
            raise _damaged(chunk, tensor, "does not match its checksum")
        self.tensors[chunk.chunk_id][tensor.name] = _restore(chunk, tensor, self._buffer)
        self._next()


def _tensors_of(
    chunks: Sequence[chunk_pb2.Chunk],
) -> Iterator[tuple[chunk_pb2.Chunk, chunk_pb2.TensorDescriptor]]:
    for chunk in chunks:
        for tensor in chunk.payload.tensors:
            yield chunk, tensor


def _byte_view(array: Array) -> memoryview:
    # Through uint8, because bfloat16 has no code in the buffer protocol.
    return array.reshape(-1).view(np.uint8).data


def _restore(chunk: chunk_pb2.Chunk, tensor: chunk_pb2.TensorDescriptor, buffer: npt.NDArray[np.uint8]) -> Array:
    try:
        return buffer.view(DTYPES[tensor.dtype]).reshape(tuple(tensor.shape))
    except (KeyError, ValueError):
        raise _damaged(chunk, tensor, "has a descriptor that contradicts itself") from None


def _damaged(chunk: chunk_pb2.Chunk, tensor: chunk_pb2.TensorDescriptor, what: str) -> DataLoss:
    return DataLoss(
        f"tensor {tensor.name!r} of chunk {chunk.chunk_id} {what}",
        reason="CHECKSUM_MISMATCH",
        metadata={"chunk_id": str(chunk.chunk_id), "tensor": tensor.name},
    )
