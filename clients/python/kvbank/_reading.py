"""What a retrieval and a fetch are made of: which calls, in which order, and what comes of their answers.

Both clients run the same generators, which ask for calls and get answers, and do no I/O over the network themselves.
Payload files of a server on this machine are read here; whatever is wrong with one of them (it is gone, it is damaged,
it may not be opened) is left to the server, which is asked for these bytes over the stream.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from kvbank import _codec, _tensors
from kvbank import _models as m
from kvbank._arrays import Array
from kvbank._exceptions import ChunkNotFound, DataLoss, FailedPrecondition, Internal, ServiceError
from kvbank._same_host import SameHost, Sharing
from kvbank.v1 import chunk_pb2, service_pb2

T = TypeVar("T")
# As many as one FetchChunks takes.
_MOST_IDS = 1000


class Answer:
    """What a call of this file answered: the frames of a stream, or one message with the names of files."""

    def __init__(self) -> None:
        self.header: Any = None
        # Of each chunk, where the call was one for files.
        self.files: Sequence[str] = ()
        self._payloads = _tensors.PayloadReader(())
        # By chunk id, verified.
        self.tensors: dict[int, dict[str, Array]] = {}

    def feed(self, frame: Any) -> None:
        """Take the next frame; DataLoss."""
        if isinstance(frame, memoryview):
            self._payloads.feed(frame)
        else:
            self.header, self.files = frame.header, getattr(frame, "files", ())
            self._payloads = _tensors.PayloadReader(() if self.files else self.wanted())
            self.tensors = self._payloads.tensors

    def finish(self) -> None:
        """After the last frame; DataLoss when bytes are missing, Internal when there was no header."""
        if self.header is None:
            raise Internal("the answer of the server has no header")
        self._payloads.finish()

    def wanted(self) -> Sequence[chunk_pb2.Chunk]:
        """The chunks whose tensors belong to the answer."""
        if isinstance(self.header, service_pb2.FetchChunksHeader):
            return self.header.chunks
        return [chunk for chunk, sent in zip(self.header.chunks, self.header.sent, strict=True) if sent]


class Call(NamedTuple):
    """A stream that is to be read to its end, or (`single`) a call with one answer."""

    method: str
    request: Any
    single: bool = False


Steps: TypeAlias = Generator[Call, Answer, T]


class Run(Generic[T]):
    """Steps under way. Each method answers the call to make next, or None at the end: then there is a `result`."""

    result: T

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps

    def begin(self) -> Call | None:
        return self._resumed(lambda: next(self._steps))

    def answered(self, answer: Answer) -> Call | None:
        """The call went well. May block, because files are read now."""
        return self._resumed(lambda: self._steps.send(answer))

    def failed(self, error: ServiceError) -> Call | None:
        """It did not; raises what the steps can do nothing about."""
        return self._resumed(lambda: self._steps.throw(error))

    def _resumed(self, resume: Callable[[], Call]) -> Call | None:
        try:
            return resume()
        except StopIteration as end:
            self.result = end.value
            return None


def retrieval(request: service_pb2.RetrieveRequest, sharing: Sharing) -> Steps[m.Retrieval]:
    """Retrieve; once more over the stream where a chunk went before its file was read (it counts once)."""
    answer = None
    if sharing.path is not None and not request.omit_payload:
        shared = service_pb2.RetrieveFilesRequest(retrieve=request, nonce=sharing.path.nonce)
        with suppress(ChunkNotFound):  # one went meanwhile; asked again, the server answers without it
            answer = yield from _by_files(Call("RetrieveFiles", shared, single=True), request, sharing.path, sharing)
    if answer is None:
        answer = yield Call("Retrieve", request)
    head = answer.header
    return m.Retrieval(
        store_id=head.store_id,
        queries=[[m.Hit(hit.chunk_id, hit.score) for hit in query.hits] for query in head.queries],
        chunks={chunk.chunk_id: _codec.chunk(chunk, answer.tensors.get(chunk.chunk_id)) for chunk in head.chunks},
    )


def fetch(request: service_pb2.FetchChunksRequest, sharing: Sharing) -> Steps[list[m.Chunk]]:
    """FetchChunks; chunks in the order asked for."""
    answer = None
    if sharing.path is not None:
        shared = service_pb2.FetchFilesRequest(fetch=request, nonce=sharing.path.nonce)
        answer = yield from _by_files(Call("FetchFiles", shared, single=True), request, sharing.path, sharing)
    if answer is None:
        answer = yield Call("FetchChunks", request)
    return [_codec.chunk(chunk, answer.tensors[chunk.chunk_id]) for chunk in answer.header.chunks]


def _by_files(call: Call, request: Any, path: SameHost, sharing: Sharing) -> Steps[Answer | None]:
    """The answer with its tensors; None where the server shares no files any more. ChunkNotFound, DataLoss."""
    try:
        answer = yield call
        yield from _complete(answer, request, path)
    except FailedPrecondition as refusal:
        if refusal.reason != "NOT_SAME_HOST":
            raise
        sharing.ignored(path)
        return None
    return answer


def _complete(answer: Answer, request: Any, path: SameHost) -> Steps[None]:
    """Tensors from files, and over the stream those that cannot be had so. ChunkNotFound, DataLoss."""
    if len(answer.files) != len(answer.header.chunks):
        raise Internal("the server names other files than chunks")
    names = {chunk.chunk_id: name for chunk, name in zip(answer.header.chunks, answer.files, strict=True)}
    missing: dict[str, list[int]] = {}
    for chunk in answer.wanted():
        try:
            stored = chunk.HasField("payload")
            payload = path.read(names[chunk.chunk_id], chunk) if stored else _tensors.Payload(chunk)
            answer.tensors[chunk.chunk_id] = payload.tensors()
        except (OSError, DataLoss):
            missing.setdefault(chunk.bank, []).append(chunk.chunk_id)
    for bank, ids in missing.items():
        for begin in range(0, len(ids), _MOST_IDS):
            fetched = yield Call(
                "FetchChunks",
                service_pb2.FetchChunksRequest(
                    bank=bank,
                    reader_digest=request.reader_digest,
                    chunk_ids=ids[begin : begin + _MOST_IDS],
                    layers=request.layers,
                ),
            )
            if fetched.header.store_id != answer.header.store_id:
                raise ChunkNotFound(f"chunk {ids[begin]} was of a store that is not served any more")
            answer.tensors |= fetched.tensors
