"""A chunk on its way from a caller to the disk: what was admitted, the bytes that have come, and the write."""

from concurrent.futures import Future

import numpy as np

from memory_service.api.calls.budget import Share
from memory_service.domain.errors import invalid
from memory_service.operations.writing import Admitted
from memory_service.storage.base import Staged, Written

# The size of a chunk's buffer while no more has come.
_FIRST_BYTES = 1024 * 1024


class ChunkBytes:
    """The bytes of a chunk's tensors while they come in.

    They are kept in one buffer: frames of a byte each, kept as they come, would take fifty times their size. A large
    buffer is made when as much as a small one has come, because its first bytes may cost a page of megabytes.
    """

    def __init__(self, length: int) -> None:
        """Expect `length` bytes of tensors."""
        self._length = self.missing = length
        self._data = np.empty(min(length, _FIRST_BYTES), np.uint8).data if length else memoryview(b"")

    def add(self, data: memoryview) -> None:
        """Add bytes that have come. Errors: INVALID_FIELD where they are more than the descriptor says."""
        if len(data) > self.missing:
            raise invalid("data", f"{len(data) - self.missing} bytes more than the tensors have")
        begin = self._length - self.missing
        if begin + len(data) > len(self._data):
            first, self._data = self._data[:begin], np.empty(self._length, np.uint8).data
            self._data[:begin] = first
        self._data[begin : begin + len(data)] = data
        self.missing -= len(data)

    def given_away(self) -> memoryview:
        """Return all bytes, and keep none."""
        data, self._data = self._data, memoryview(b"")
        return data


class Incoming:
    """A chunk that was admitted, and how its write has ended, once it has: `written`, or `error`.

    It does not refer to the future of the write, which refers to it: chunks would then wait in cycles for Python's
    collector, which costs a tenth of a small write.
    """

    def __init__(self, admitted: Admitted, staged: Staged | None, share: Share, size: int) -> None:
        """Begin to take a chunk in. staged: the file that has its tensors; None where they come over the stream. share:
        the bytes that it holds in memory. size: the bytes that it takes of the stream's window."""
        payload = admitted.chunk.payload
        self.admitted = admitted
        self.staged = staged
        self.share = share
        self.size = size
        self.length = payload.length if payload else 0
        self.bytes = ChunkBytes(0 if staged else self.length)
        # Whether it is written together with others.
        self.gathered = False
        self.written: Written | None = None
        self.error: BaseException | None = None

    @property
    def object_bytes(self) -> int:
        """Return the bytes that the chunk's object has, about: its header has what the message says, as letters."""
        return self.length + 2 * (self.size - self.length)

    @property
    def settled(self) -> bool:
        """Tell whether the write has ended."""
        return self.written is not None or self.error is not None

    def settle(self, write: "Future[Written]") -> None:
        """Note how the write has ended."""
        self.error = write.exception()
        if self.error is None:
            self.written = write.result()

    def body(self) -> memoryview | Staged:
        """Return the bytes of the chunk, which are given away, or the file that has them."""
        return self.staged or self.bytes.given_away()
