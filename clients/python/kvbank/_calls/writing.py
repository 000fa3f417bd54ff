"""The order of a pipelined write is kept here: what was sent, what was acknowledged, what is sent again.

Nothing here does I/O or takes a lock.

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
from kvbank._calls import chunk_messages, metadata, tensors
from kvbank._exceptions import Internal, ServiceError
from kvbank._models import NewChunk, WriteResult
from kvbank.v1 import service_pb2


@dataclass(slots=True)
class Upload:
    """A chunk in its wire form.

    key: its idempotency key. buffers: the bytes of its tensors, `length` in all. size: bytes that it takes of those
    which the server allows to be unacknowledged. staged: name of the file that has the bytes for the server; empty
    where none has.
    """

    key: bytes
    header: service_pb2.ChunkHeader
    buffers: list[memoryview]
    size: int
    length: int = 0
    staged: str = ""

    def naming(self, staged: service_pb2.StagedPayload) -> service_pb2.ChunkHeader:
        """Return a header that names a file with the bytes, and keep the name."""
        self.staged = staged.name
        header = service_pb2.ChunkHeader()
        header.CopyFrom(self.header)
        header.staged.CopyFrom(staged)
        return header

    def bringing(self) -> service_pb2.ChunkHeader:
        """Return a header that brings the bytes along."""
        header = service_pb2.ChunkHeader()
        header.CopyFrom(self.header)
        header.data = b"".join(self.buffers)
        return header


# Headers that go together: fewer bytes than a frame has, so that the server is at work on some while others come.
_TOGETHER_BYTES = 256 * 1024

Begun: TypeAlias = tuple[service_pb2.ChunkHeader, list[memoryview]]


def takes_no_file(error: ServiceError) -> bool:
    """Tell whether a write failed because the server does not take a staged file of this client."""
    return error.reason == "STAGED_FILE"


def takes_no_data(error: ServiceError) -> bool:
    """Tell whether a write may have failed because the server does not know headers that bring bytes along: it then
    waits for bytes that do not come, and says of the next frame, or of the end, that they are missing."""
    return error.reason == "INVALID_FIELD" and error.metadata.get("field") in ("data", "headers")


def frames(uploads: "SimpleQueue[Upload | None]", begin: Callable[[Upload], Begun]) -> Iterator[Any]:
    """Yield the requests of a stream, until the queue has None.

    begin: gives header and bytes of an upload, with no bytes where its header names a file. Chunks that need no data
    frames and wait at the same time go together.
    """
    together, size = service_pb2.ChunkHeaders(), 0
    while (upload := uploads.get()) is not None:
        header, buffers = begin(upload)
        if not buffers:
            together.headers.append(header)
            size += header.ByteSize()
        if together.headers and (buffers or size > _TOGETHER_BYTES or uploads.empty()):
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
    """The state of one `write_many`, over as many streams as it takes.

    An upload goes from `peek` or `put` by `advance` to `pending`, and by `acknowledge` to `results`.
    """

    def __init__(
        self,
        bank: str,
        chunks: Iterable[NewChunk],
        reader_digest: str,
        embedder_digest: str,
        bound: int,
        typed: bool = True,
        inline: int = 0,
    ) -> None:
        """Begin a write with nothing sent. chunks: consumed by `peek`; behind them come those of `put`.

        bound: most bytes that may be in flight; a single larger chunk goes alone.
        typed: whether the server keeps metadata of every type.
        inline: the most bytes of tensors that a header may bring along.
        """
        self.inline = inline
        self.results: list[WriteResult] = []
        self.pending: deque[Upload] = deque()
        self._bank, self._reader_digest, self._embedder_digest = bank, reader_digest, embedder_digest
        self._uploads = map(self._upload, iterable("chunks", chunks))
        self._typed = typed
        self._next: Upload | None = None
        # What the caller's iterable raised, or the error of a chunk that is refused here; no chunk comes after it.
        self.failure: Exception | None = None
        self._bound = bound
        self._in_flight = 0
        self._progressed = 0.0

    def finished(self) -> bool:
        """Tell whether every chunk is acknowledged and none follows."""
        return not self.pending and self.peek() is None

    def peek(self) -> Upload | None:
        """Return the upload that goes next; None after the last one, and after the last one before a failure."""
        if self._next is None and self.failure is None:
            try:
                self._next = next(self._uploads, None)
            except Exception as error:  # kept apart from the errors of the stream, some of which mean "send again"
                self.failure = error
        return self._next

    def written(self) -> list[WriteResult]:
        """Return the results, once all is acknowledged, or raise the failure that ended the chunks."""
        if self.failure is not None:
            raise self.failure
        return self.results

    def put(self, chunk: NewChunk) -> None:
        """Have `peek` return the upload of `chunk`; only where it returned None before. Errors: InvalidArgument;
        FailedPrecondition for metadata that the server does not keep."""
        self._next = self._upload(chunk)

    def waiting_since(self) -> float:
        """Return when (time.monotonic()) the wait for the next acknowledgement began; now, where none is due."""
        return self._progressed if self.pending else time.monotonic()

    def has_room(self) -> bool:
        """Tell whether the upload of `peek` may be sent now."""
        return self._next is None or not self.pending or self._in_flight + self._next.size <= self._bound

    def advance(self) -> Upload:
        """Move the upload of `peek` to `pending` and return it, for the caller to send."""
        upload = self._next
        assert upload is not None
        self._next = None
        if not self.pending:
            self._progressed = time.monotonic()
        self._in_flight += upload.size
        self.pending.append(upload)
        return upload

    def acknowledge(self, response: service_pb2.WriteChunksResponse) -> None:
        """Take a response, which acknowledges one chunk or several in order. Errors: Internal for another chunk than
        the first that is pending."""
        for ack in (response, *response.more):
            self._acknowledge(ack)

    def _acknowledge(self, response: service_pb2.WriteChunksResponse) -> None:
        if not self.pending or self.pending[0].key != response.idempotency_key:
            raise Internal("the server acknowledged a chunk out of order")
        self._in_flight -= self.pending.popleft().size
        self._progressed = time.monotonic()
        self.results.append(chunk_messages.read_written(response))

    def _upload(self, chunk: NewChunk) -> Upload:
        header, buffers = chunk_messages.header(self._bank, chunk, self._reader_digest, self._embedder_digest)
        metadata.check_kept(header.chunk, self._typed)
        length = sum(map(len, buffers))
        return Upload(chunk.idempotency_key, header, buffers, header.ByteSize() + length, length)
