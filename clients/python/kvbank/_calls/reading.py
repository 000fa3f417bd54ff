"""What a retrieval and a fetch are made of: which calls, in which order, and what comes of their answers.

Both clients run the same generators, which ask for calls and get answers, and do no I/O over the network themselves.
Payload files of a server on this machine are read here; whatever is wrong with one of them (it is gone, it is damaged,
it may not be opened) is left to the server, which is asked for these bytes over the stream.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from kvbank import _models as m
from kvbank._arrays import Array
from kvbank._calls import codec
from kvbank._calls import tensors as _tensors
from kvbank._calls.answers import odd, understood
from kvbank._exceptions import ChunkNotFound, DataLoss, FailedPrecondition, ServiceError
from kvbank._transport.same_host import SameHost, Sharing
from kvbank.v1 import chunk_pb2, service_pb2

T = TypeVar("T")


class Answer:
    """What a call of this file answered: the frames of a stream, or one message with the names of files."""

    def __init__(self) -> None:
        self.header: Any = None
        # Of each chunk, where the call was one for files.
        self.files: Sequence[str] = ()
        self._payloads = _tensors.PayloadReader(())
        # By chunk id, verified.
        self.tensors: dict[int, dict[str, Array]] = {}

    @understood()
    def feed(self, frame: Any) -> None:
        """Take the next frame; DataLoss, Internal for one that makes no sense."""
        if isinstance(frame, memoryview):
            self._payloads.feed(frame)
        elif self.header is not None or not frame.HasField("header"):
            raise odd("its first frame, and no other, must be a header")
        else:
            self.header, self.files = frame.header, getattr(frame, "files", ())
            self._payloads = _tensors.PayloadReader(() if self.files else self.wanted())
            self.tensors = self._payloads.tensors

    @understood()
    def finish(self) -> None:
        """After the last frame; DataLoss when bytes are missing, Internal when there was no header."""
        if self.header is None:
            raise odd("it has no header")
        self._payloads.finish()

    def given(self, chunk_id: int, form: _tensors.Form) -> dict[str, Any] | None:
        """The tensors of a chunk for the caller, None where the answer has none."""
        tensors = self.tensors.get(chunk_id)
        return None if tensors is None else {name: form(array) for name, array in tensors.items()}

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


def retrieval(request: service_pb2.RetrieveRequest, sharing: Sharing, form: _tensors.Form) -> Steps[m.Retrieval]:
    """Retrieve, with tensors in the form that is wanted; once more over the stream where a file could not be read (it
    counts once)."""
    if (path := sharing.path) is not None and not request.omit_payload:
        shared = service_pb2.RetrieveFilesRequest(retrieve=request, proof=path.proof)
        files = yield from _by_files(Call("RetrieveFiles", shared, single=True), path, sharing)
        if files is not None and _complete(files, path):
            return _retrieval(request, files, form)
    return _retrieval(request, (yield Call("Retrieve", request)), form)


def fetch(request: service_pb2.FetchChunksRequest, sharing: Sharing, form: _tensors.Form) -> Steps[list[m.Chunk]]:
    """FetchChunks; chunks in the order asked for, tensors in the form that is wanted."""
    files = None
    if (path := sharing.path) is not None:
        shared = service_pb2.FetchFilesRequest(fetch=request, proof=path.proof)
        files = yield from _by_files(Call("FetchFiles", shared, single=True), path, sharing)
        if files is not None and _complete(files, path):
            return _fetched(request, files, form)
    answer = yield Call("FetchChunks", request)
    if files is not None and files.header.store_id != answer.header.store_id:
        raise ChunkNotFound(f"chunk {request.chunk_ids[0]} was of a store that is not served any more")
    return _fetched(request, answer, form)


@understood()
def _retrieval(request: service_pb2.RetrieveRequest, answer: Answer, form: _tensors.Form) -> m.Retrieval:
    head = answer.header
    chunks = {chunk.chunk_id: codec.chunk(chunk, answer.given(chunk.chunk_id, form)) for chunk in head.chunks}
    queries = [[m.Hit(hit.chunk_id, hit.score) for hit in query.hits] for query in head.queries]
    if len(queries) * 4 * request.dimension != len(request.queries):
        raise odd(f"it has hits of {len(queries)} queries")
    if any(hit.chunk_id not in chunks for hits in queries for hit in hits):
        raise odd("it has a hit of a chunk that it does not have")
    held = {held.chunk_id for held in request.held}
    missing = (chunk.tensors is None and chunk.layout and id not in held for id, chunk in chunks.items())
    if not request.omit_payload and any(missing):
        raise odd("it has a chunk without its tensors")
    return m.Retrieval(head.store_id, queries, chunks)


@understood()
def _fetched(request: service_pb2.FetchChunksRequest, answer: Answer, form: _tensors.Form) -> list[m.Chunk]:
    if [chunk.chunk_id for chunk in answer.header.chunks] != list(request.chunk_ids):
        raise odd("it has other chunks than were asked for")
    return [codec.chunk(chunk, answer.given(chunk.chunk_id, form)) for chunk in answer.header.chunks]


def _by_files(call: Call, path: SameHost, sharing: Sharing) -> Steps[Answer | None]:
    """The answer with the names of files; None where the server shares no files any more."""
    try:
        return (yield call)
    except FailedPrecondition as refusal:
        if refusal.reason != "NOT_SAME_HOST":
            raise
        sharing.ignored(path)
        return None


@understood()
def _complete(answer: Answer, path: SameHost) -> bool:
    """Read the tensors from the files; whether all could be read. Where one could not, all are asked for over the
    stream: a server that learned which file it was could find out what is in one."""
    if len(answer.files) != len(answer.header.chunks):
        raise odd("it names other files than chunks")
    names = {chunk.chunk_id: name for chunk, name in zip(answer.header.chunks, answer.files, strict=True)}
    try:
        for chunk in answer.wanted():
            stored = chunk.HasField("payload")
            payload = path.read(names[chunk.chunk_id], chunk) if stored else _tensors.Payload(chunk)
            answer.tensors[chunk.chunk_id] = payload.tensors()
    except (OSError, DataLoss):
        return False
    return True
