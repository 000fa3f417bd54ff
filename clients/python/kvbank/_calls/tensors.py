"""Arrays become bytes with checksums here, and received bytes become verified arrays.

This file owns the rule that no byte of a tensor reaches a caller before the checksum of the tensor was compared.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash

from kvbank import _arrays
from kvbank._arguments import choice, invalid, shown
from kvbank._arrays import Array
from kvbank._exceptions import DataLoss, InvalidArgument, MissingExtra
from kvbank.v1 import bank_pb2, chunk_pb2
from kvbank.wire import frames as _frames

Form = Callable[[Array], Any]

# The tensors of a chunk share one piece of memory, each of them aligned to a cache line.
_ALIGNMENT = 64
_MOST_DIMENSIONS = 8

DTYPES: dict[int, np.dtype[Any]] = {
    bank_pb2.DATA_TYPE_BF16: np.dtype(ml_dtypes.bfloat16),
    bank_pb2.DATA_TYPE_FP16: np.dtype("<f2"),
    bank_pb2.DATA_TYPE_FP32: np.dtype("<f4"),
    bank_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
}
_BY_DTYPE = {dtype: number for number, dtype in DTYPES.items()}
# glibc learns from the largest piece that was freed how much it may keep: without this it gives every megabyte of a
# received answer back to the system, and the page faults of the next one cost more than its bytes. Nothing is touched.
np.empty(31 << 20, np.uint8)


def as_embedding(field: str, values: Any, ndim: int) -> npt.NDArray[np.float32]:
    """Return values as finite little-endian float32, contiguous, of `ndim` dimensions.

    One vector stands for a list of one where `ndim` is 2. field: names the argument in an error.
    Errors: InvalidArgument (NOT_FINITE for NaN and Inf).
    """
    try:
        given = _numbers(values)
        if given.dtype.kind not in "iuf" and given.dtype != DTYPES[bank_pb2.DATA_TYPE_BF16]:
            raise TypeError(f"the elements are {given.dtype}")
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(given, dtype="<f4")
    except Exception as error:  # whatever the caller's object raises when it is asked for its numbers
        raise invalid(field, f"expected an array of numbers, got {shown(values)}: {error}") from None
    if ndim == 2 and array.ndim == 1:
        array = array[np.newaxis]
    if array.ndim != ndim or array.size == 0:
        raise invalid(field, f"expected {ndim} dimensions and not empty, got {array.shape}")
    if not np.isfinite(array).all():
        text = f"{field}: NaN or Inf in an embedding"
        raise InvalidArgument(text, reason="NOT_FINITE", metadata={"field": field})
    return array


def _numbers(values: Any) -> Array:
    if isinstance(values, list | tuple):
        values = [_arrays.to_numpy(value) for value in values]
    return np.asarray(_arrays.to_numpy(values))


def describe(name: str, tensor: Any) -> tuple[chunk_pb2.TensorDescriptor, memoryview]:
    """Return the descriptor of a tensor that is to be written, of numpy or torch, and its bytes.

    The bytes are copied only where the tensor is not contiguous. Errors: InvalidArgument (TENSOR_MISMATCH).
    """
    try:
        array = _arrays.to_numpy(tensor)
    except Exception as error:  # torch's, for a tensor without data or in a form of its own
        raise _unusable(name, f"cannot be read: {error}") from None
    number = _BY_DTYPE.get(array.dtype) if isinstance(array, np.ndarray) else None
    if number is None:
        found = array.dtype if isinstance(array, np.ndarray) else shown(tensor)
        raise _unusable(name, f"is {found}; expected an array or a tensor of bfloat16, float16, float32 or int32")
    shape = array.shape
    view = _byte_view(np.ascontiguousarray(array))
    checksum = xxhash.xxh3_64_intdigest(view)
    descriptor = chunk_pb2.TensorDescriptor(name=name, dtype=number, shape=shape, length=len(view), checksum=checksum)  # type: ignore[arg-type]
    return descriptor, view


def _unusable(name: str, what: str) -> InvalidArgument:
    text = f"tensor {name!r} {what}"
    return InvalidArgument(text, reason="TENSOR_MISMATCH", metadata={"tensor": name, "field": "tensors"})


def frames(buffers: Sequence[memoryview]) -> Iterator[bytes]:
    """Yield the bytes of `buffers`, one after the other, as encoded data frames of 1 MiB; the last may be shorter."""
    pieces: list[memoryview] = []
    room = _frames.FRAME_BYTES
    for buffer in buffers:
        start = 0
        while start < len(buffer):
            piece = buffer[start : start + room]
            pieces.append(piece)
            start += len(piece)
            room -= len(piece)
            if room == 0:
                yield _frames.encode(pieces)
                pieces, room = [], _frames.FRAME_BYTES
    if pieces:
        yield _frames.encode(pieces)


def form(name: Any) -> Form:
    """Return the function that turns an array into a tensor of a library. name: "numpy" or "torch".

    Errors: InvalidArgument for another name, MissingExtra where torch is not installed.
    """
    made = choice("tensors", name, _FORMS)
    if made is _arrays.to_torch:
        try:
            import_module("torch")
        except ModuleNotFoundError as error:
            raise MissingExtra(f"tensors of torch need torch (no module {error.name!r})") from None
    return made


def _as_it_is(array: Array) -> Any:
    return array


_FORMS: Mapping[str, Form] = {"numpy": _as_it_is, "torch": _arrays.to_torch}


class Payload:
    """The memory for the tensors of one chunk. A reader fills its `views`, and each tensor is verified before it is
    handed out."""

    def __init__(self, chunk: chunk_pb2.Chunk, file: npt.NDArray[np.uint8] | None = None) -> None:
        """Take memory for the tensors of `chunk`, as its descriptors say.

        file: the bytes of the whole payload file, of which the tensors are views then; None for new memory.
        Errors: DataLoss for a descriptor that contradicts itself or the file, and where there is not enough memory.
        """
        self.chunk = chunk
        self.descriptors = chunk.payload.tensors
        self._seed = chunk.payload.seed
        self._verified: dict[str, Array] = {}
        begins, end = [], 0
        for tensor in self.descriptors:
            dtype = DTYPES.get(tensor.dtype)
            size = -1 if dtype is None else math.prod(tensor.shape) * dtype.itemsize
            if size != tensor.length or min(tensor.shape, default=0) < 0 or len(tensor.shape) > _MOST_DIMENSIONS:
                raise _damaged(chunk, tensor, "has a descriptor that contradicts itself")
            if file is not None and not 0 <= tensor.offset <= len(file) - tensor.length:
                raise _damaged(chunk, tensor, "is not within its file")
            begins.append(end)
            end += -(-tensor.length // _ALIGNMENT) * _ALIGNMENT
        if file is not None:
            memory, first, begins = file, 0, [tensor.offset for tensor in self.descriptors]
        else:
            memory = _room(chunk, end + _ALIGNMENT)
            first = -memory.ctypes.data % _ALIGNMENT
        self._arrays = [
            memory[first + begin : first + begin + tensor.length]
            for begin, tensor in zip(begins, self.descriptors, strict=True)
        ]
        # The place for the bytes of each tensor.
        self.views = [array.data for array in self._arrays]

    def verify(self, index: int) -> None:
        """Compare the tensor `index`, whose view is filled, with its checksum. Errors: DataLoss."""
        tensor, array = self.descriptors[index], self._arrays[index]
        if xxhash.xxh3_64_intdigest(self.views[index], seed=self._seed) != tensor.checksum:
            raise _damaged(self.chunk, tensor, "does not match its checksum")
        self._verified[tensor.name] = array.view(DTYPES[tensor.dtype]).reshape(tuple(tensor.shape))

    def tensors(self) -> dict[str, Array]:
        """Return the tensors by name. Errors: DataLoss unless every tensor is verified."""
        for tensor in self.descriptors[len(self._verified) :]:
            raise _damaged(self.chunk, tensor, "ended early")
        return self._verified


def _room(chunk: chunk_pb2.Chunk, size: int) -> npt.NDArray[np.uint8]:
    """Return memory of so many bytes. It is not touched before bytes come, so that a size that is only declared takes
    none. Errors: DataLoss where there is not enough."""
    try:
        return np.empty(size, np.uint8)
    except (MemoryError, ValueError, OverflowError):
        text = f"there is no memory for chunk {chunk.chunk_id}, which is said to have {size} bytes"
        raise DataLoss(text, reason="ODD_ANSWER", metadata={"chunk_id": str(chunk.chunk_id)}) from None


class PayloadReader:
    """A reader of payloads from a stream of bytes, whose frames need not end where a tensor ends.

    tensors: those of complete chunks, verified, by chunk id and name.
    """

    def __init__(self, chunks: Sequence[chunk_pb2.Chunk]) -> None:
        """Begin with the first chunk. chunks: those whose bytes follow, in that order."""
        self._todo = iter(chunks)
        self._payload: Payload | None = None
        self._index = self._filled = 0
        self.tensors: dict[int, dict[str, Array]] = {}
        self._next()

    def feed(self, data: memoryview) -> None:
        """Take the bytes of one frame. Errors: DataLoss where a tensor is complete and differs from its checksum, and
        for more bytes than were announced."""
        while data:
            if self._payload is None:
                raise DataLoss("the server sent more bytes than it announced")
            view = self._payload.views[self._index]
            part = data[: len(view) - self._filled]
            view[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            self._next()

    def finish(self) -> None:
        """Check that no bytes are missing. Errors: DataLoss."""
        if self._payload is not None:
            self._payload.tensors()

    def _next(self) -> None:
        """Verify the tensors that are complete, and go on to the next; a tensor without bytes is complete at once."""
        while True:
            if self._payload is None:
                if (chunk := next(self._todo, None)) is None:
                    return
                self._payload, self._index = Payload(chunk), 0
            payload = self._payload
            while self._index < len(payload.views) and self._filled == len(payload.views[self._index]):
                payload.verify(self._index)
                self._index, self._filled = self._index + 1, 0
            if self._index < len(payload.views):
                return
            self.tensors[payload.chunk.chunk_id] = payload.tensors()
            self._payload = None


def verify_header(chunk: chunk_pb2.Chunk, header: bytes) -> None:
    """Check that the header of a payload file is the one that was written. Errors: DataLoss."""
    payload = chunk.payload
    checksum = xxhash.xxh3_64_intdigest(header, seed=payload.seed)
    if payload.HasField("header_checksum") and checksum != payload.header_checksum:
        text = f"the header of the file of chunk {chunk.chunk_id} does not match its checksum"
        raise DataLoss(text, reason="CHECKSUM_MISMATCH", metadata={"chunk_id": str(chunk.chunk_id)})


def _byte_view(array: Array) -> memoryview:
    # Through uint8, because bfloat16 has no code in the buffer protocol.
    return array.reshape(-1).view(np.uint8).data


def _damaged(chunk: chunk_pb2.Chunk, tensor: chunk_pb2.TensorDescriptor, what: str) -> DataLoss:
    return DataLoss(
        f"tensor {tensor.name!r} of chunk {chunk.chunk_id} {what}",
        reason="CHECKSUM_MISMATCH",
        metadata={"chunk_id": str(chunk.chunk_id), "tensor": tensor.name},
    )
