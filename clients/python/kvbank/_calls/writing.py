"""The order of a pipelined write: what was sent, what was acknowledged, what goes again. No I/O and no locks.

This file owns the rule that a chunk leaves `pending` only by its own acknowledgement, so that whatever a broken stream
swallowed is sent again under the same key.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeAlias

from kvbank._arguments import iterable
from kvbank._calls import codec, metadata, tensors
from kvbank._exceptions import Internal, ServiceError
from kvbank._models import NewChunk, WriteResult
from kvbank._transport.same_host import SameHost
from kvbank.v1 import service_pb2
from kvbank.wire import frames as _frames


@dataclass(slots=True)
class Upload:
    """A chunk in its wire form; `size` is what it takes of the server's unacknowledged bytes."""

    key: bytes
    header: service_pb2.ChunkHeader
    buffers: list[memoryview]
    size: int
    staged: str = ""

    def begin(self, path: SameHost | None) -> tuple[service_pb2.ChunkHeader, list[memoryview]]:
        """Header and bytes; with `path`, if that is possible, a header that names a file with the bytes."""
        staged = path.stage(self.buffers, self.header.ByteSize()) if path is not None and self.buffers else None
        if staged is None:
            return self.header, self.buffers
        self.staged = staged.name
        header = service_pb2.ChunkHeader()
        header.CopyFrom(self.header)
        header.staged.CopyFrom(staged)
        return header, []


Begun: TypeAlias = tuple[service_pb2.ChunkHeader, list[memoryview]]


def frames(uploads: "SimpleQueue[Upload | None]", begin: Callable[[Upload], Begun]) -> Iterator[Any]:
    """The requests of a stream, until None. Chunks that need no data frames and wait at the same time go together."""
    together, size = service_pb2.ChunkHeaders(), 0
    while (upload := uploads.get()) is not None:
        header, buffers = begin(upload)
        if not buffers:
            together.headers.append(header)
            size += header.ByteSize()
        if together.headers and (buffers or size > _frames.FRAME_BYTES or uploads.empty()):
            yield _request(together)
            together, size = service_pb2.ChunkHeaders(), 0
        if buffers:
            yield service_pb2.WriteChunksRequest(header=header)
            yield from tensors.frames(buffers)
    if together.headers:
        yield _request(together)


def _request(together: service_pb2.ChunkHeaders) -> service_pb2.WriteChunksRequest:
    if len(together.headers) == 1:
        return service_pb2.WriteChunksRequest(header=together.headers[0])
    return service_pb2.WriteChunksRequest(headers=together)


class WriteSession:
    """One `write_many`, over as many streams as it takes."""

    def __init__(
        self,
        bank: str,
        chunks: Iterable[NewChunk],
        reader_digest: str,
        embedder_digest: str,
        bound: int,
        path: SameHost | None = None,
        typed: bool = True,
    ) -> None:
        """chunks: consumed by `peek`; behind them come those of `put`.

        bound: most bytes that may be in flight; a single larger chunk goes alone. path: where to stage payloads.
        typed: whether the server keeps metadata of every type.
        """
        self.results: list[WriteResult] = []
        self.pending: deque[Upload] = deque()
        self.path = path
        self._bank, self._reader_digest, self._embedder_digest = bank, reader_digest, embedder_digest
        self._uploads = map(self._upload, iterable("chunks", chunks))
        self._typed = typed
        self._next: Upload | None = None
        # What the caller's iterable raised, or a chunk that is refused here; nothing comes after it.
        self.failure: Exception | None = None
        self._bound = bound
        self._in_flight = 0
        self._progressed = 0.0

    def finished(self) -> bool:
        return not self.pending and self.peek() is None

    def peek(self) -> Upload | None:
        """The upload that goes next; None after the last one, and after the last one before a failure."""
        if self._next is None and self.failure is None:
            try:
                self._next = next(self._uploads, None)
            except Exception as error:  # kept apart from the errors of the stream, some of which mean "send again"
                self.failure = error
        return self._next

    def written(self) -> list[WriteResult]:
        """The results, once all is acknowledged; raises the failure that ended the chunks."""
        if self.failure is not None:
            raise self.failure
        return self.results

    def put(self, chunk: NewChunk) -> None:
        """Have `peek` answer this one, for which there is no other."""
        self._next = self._upload(chunk)

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

    def unstage(self) -> None:
        """A stream has ended: files that the server did not take are removed."""
        for upload in self.pending:
            if upload.staged and self.path is not None:
                self.path.unstage(upload.staged)
                upload.staged = ""

    def refused(self, error: ServiceError) -> bool:
        """Whether the rest goes over the stream from here on, because the server takes no file of ours."""
        if self.path is None or error.reason != "STAGED_FILE":
            return False
        self.path = None
        return True

    def acknowledge(self, response: service_pb2.WriteChunksResponse) -> None:
        for ack in (response, *response.more):
            self._acknowledge(ack)

    def _acknowledge(self, response: service_pb2.WriteChunksResponse) -> None:
        if not self.pending or self.pending[0].key != response.idempotency_key:
            raise Internal("the server acknowledged a chunk out of order")
        self._in_flight -= self.pending.popleft().size
        self._progressed = time.monotonic()
        self.results.append(codec.write_result(response))

    def _upload(self, chunk: NewChunk) -> Upload:
        header, buffers = codec.header(self._bank, chunk, self._reader_digest, self._embedder_digest)
        metadata.check_kept(header.chunk, self._typed)
        return Upload(chunk.idempotency_key, header, buffers, header.ByteSize() + sum(map(len, buffers)))
