"""The order of a pipelined write: what was sent, what was acknowledged, what goes again. No I/O and no locks.

This file owns the rule that a chunk leaves `pending` only by its own acknowledgement, so that whatever a broken stream
swallowed is sent again under the same key.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvbank import _codec, _tensors
from kvbank._exceptions import Internal
from kvbank._models import NewChunk, WriteResult
from kvbank.v1 import service_pb2


@dataclass(frozen=True, slots=True)
class Upload:
    """A chunk in its wire form; `size` is what it takes of the server's unacknowledged bytes."""

    key: bytes
    header: service_pb2.WriteChunksRequest
    buffers: list[memoryview]
    size: int

    def frames(self) -> Iterator[service_pb2.WriteChunksRequest]:
        yield self.header
        for data in _tensors.frames(self.buffers):
            yield service_pb2.WriteChunksRequest(data=data)


class WriteSession:
    """One `write_many`, over as many streams as it takes."""

    def __init__(
        self, bank: str, chunks: Iterable[NewChunk], reader_digest: str, embedder_digest: str, bound: int
    ) -> None:
        """bound: most bytes that may be in flight; a single larger chunk goes alone."""
        self.results: list[WriteResult] = []
        self.pending: deque[Upload] = deque()
        self._uploads = (_upload(bank, chunk, reader_digest, embedder_digest) for chunk in chunks)
        self._next: Upload | None = None
        self._bound = bound
        self._in_flight = 0
        self._progressed = 0.0

    def finished(self) -> bool:
        return not self.pending and self.peek() is None

    def peek(self) -> Upload | None:
        """The upload that goes next; None after the last one."""
        if self._next is None:
            self._next = next(self._uploads, None)
        return self._next

    def waiting_since(self) -> float:
        """When (time.monotonic()) the wait for the next acknowledgement began; now, where none is due."""
        return self._progressed if self.pending else time.monotonic()

    def has_room(self) -> bool:
        """Whether the upload of `peek` may be sent now."""
        return self._next is None or not self.pending or self._in_flight + self._next.size <= self._bound

    def advance(self) -> Upload:
        """Move the upload of `peek` to `pending`; send it then."""
        upload = self._next
        assert upload is not None
        self._next = None
        if not self.pending:
            self._progressed = time.monotonic()
        self._in_flight += upload.size
        self.pending.append(upload)
        return upload

    def acknowledge(self, response: service_pb2.WriteChunksResponse) -> None:
        if not self.pending or self.pending[0].key != response.idempotency_key:
            raise Internal("the server acknowledged a chunk out of order")
        self._in_flight -= self.pending.popleft().size
        self._progressed = time.monotonic()
        self.results.append(_codec.write_result(response))


def _upload(bank: str, chunk: NewChunk, reader_digest: str, embedder_digest: str) -> Upload:
    header, buffers = _codec.header(bank, chunk, reader_digest, embedder_digest)
    return Upload(chunk.idempotency_key, header, buffers, header.ByteSize() + sum(map(len, buffers)))
