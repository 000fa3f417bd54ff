"""A retrieval and a fetch are generators here, which say what to call, in which order, and what comes of the answers.

Both clients run the same generators, which do no I/O themselves. Where the server shares its data folder with this
process, the first call asks for the names of payload files, and the client reads the tensors out of the files. Where
one of the files cannot be read (it is gone, it is damaged, it may not be opened) the second call asks for all tensors
over the stream.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from kvbank import _models as m
from kvbank._arrays import Array
from kvbank._calls import chunk_messages
from kvbank._calls import tensors as _tensors
from kvbank._calls.answers import odd, understood
from kvbank._exceptions import ChunkNotFound, FailedPrecondition, ServiceError
from kvbank.v1 import chunk_pb2, service_pb2

T = TypeVar("T")


class Answer:
    """The answer to a call of this file: the frames of a stream, or one message with the names of files."""

    def __init__(self) -> None:
        self.header: Any = None
        # The name of each chunk's payload file, where the call was one for files.
        self.files: Sequence[str] = ()
        # Whether `tensors` has all that the answer says; False where a file could not be read.
        self.complete = True
        self._payloads = _tensors.PayloadReader(())
        # The verified tensors by chunk id and name.
        self.tensors: dict[int, dict[str, Array]] = {}

    @understood()
    def feed(self, frame: Any) -> None:
        """Take the next frame: a message, or a view of bytes of tensors. Errors: DataLoss; Internal for a frame that
        makes no sense."""
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
        """Check, after the last frame, that nothing is missing. Errors: DataLoss for bytes, Internal for the header."""
        if self.header is None:
            raise odd("it has no header")
        self._payloads.finish()

    def named(self) -> dict[int, str]:
        """Return the name of the payload file of each chunk id. Errors: Internal where there are more or fewer."""
        if len(self.files) != len(self.header.chunks):
            raise odd("it names other files than chunks")
        return {chunk.chunk_id: name for chunk, name in zip(self.header.chunks, self.files, strict=True)}

    def given(self, chunk_id: int, form: _tensors.Form) -> dict[str, Any] | None:
        """Return the tensors of a chunk in the form that the caller wants; None where the answer has none."""
        tensors = self.tensors.get(chunk_id)
        return None if tensors is None else {name: form(array) for name, array in tensors.items()}

    def wanted(self) -> Sequence[chunk_pb2.Chunk]:
        """Return the chunks whose tensors belong to the answer."""
        if isinstance(self.header, service_pb2.FetchChunksHeader):
            return self.header.chunks
        return [chunk for chunk, sent in zip(self.header.chunks, self.header.sent, strict=True) if sent]


class SharedFolder(Protocol):
    """A data folder that this process shares with its server, as the calls of this file see it."""

    @property
    def proof(self) -> bytes:
        """Return the bytes that show the server that this client may read the folder."""

    def fill(self, answer: Answer) -> None:
        """Read the tensors of `answer` from the files that it names; it is not `complete` where one cannot be read."""


class Call(NamedTuple):
    """A call that steps ask for.

    folder: where the files are that the one message of the answer names, and out of which the answer is to be filled;
    None for a stream, which is to be read to its end.
    """

    method: str
    request: Any
    folder: SharedFolder | None = None


Steps: TypeAlias = Generator[Call, Answer, T]


def retrieval(
    request: service_pb2.RetrieveRequest, folder: SharedFolder | None, form: _tensors.Form
) -> Steps[m.Retrieval]:
    """Retrieve from the files of `folder`, where it is given and its files can be read, else over the stream.

    form: makes of each tensor what the caller wants. The server counts both calls once.
    """
    if folder is not None:
        shared = service_pb2.RetrieveFilesRequest(retrieve=request, proof=folder.proof)
        files = yield from _by_files(Call("RetrieveFiles", shared, folder))
        if files is not None and files.complete:
            return _retrieval(request, files, form)
    return _retrieval(request, (yield Call("Retrieve", request)), form)


def fetch(
    request: service_pb2.FetchChunksRequest, folder: SharedFolder | None, form: _tensors.Form
) -> Steps[list[m.Chunk]]:
    """Fetch chunks in the order asked for, from the files of `folder` or over the stream, as `retrieval` does.

    Errors: ChunkNotFound where another store is served than the one that named the files.
    """
    files = None
    if folder is not None:
        shared = service_pb2.FetchFilesRequest(fetch=request, proof=folder.proof)
        files = yield from _by_files(Call("FetchFiles", shared, folder))
        if files is not None and files.complete:
            return _fetched(request, files, form)
    answer = yield Call("FetchChunks", request)
    if files is not None and files.header.store_id != answer.header.store_id:
        raise ChunkNotFound(f"chunk {request.chunk_ids[0]} was of a store that is not served any more")
    return _fetched(request, answer, form)


@understood()
def _retrieval(request: service_pb2.RetrieveRequest, answer: Answer, form: _tensors.Form) -> m.Retrieval:
    head = answer.header
    chunks = {chunk.chunk_id: chunk_messages.read(chunk, answer.given(chunk.chunk_id, form)) for chunk in head.chunks}
    queries = [[m.Hit(hit.chunk_id, hit.score) for hit in query.hits] for query in head.queries]
    if len(queries) * 4 * request.dimension != len(request.queries):
        raise odd(f"it has hits of {len(queries)} queries")
    if any(hit.chunk_id not in chunks for hits in queries for hit in hits):
        raise odd("it has a hit of a chunk that it does not have")
    held = {held.chunk_id for held in request.held}
    missing = (chunk.tensors is None and chunk.layout and id not in held for id, chunk in chunks.items())
    if not request.omit_payload and any(missing):
        raise odd("it has a chunk without its tensors")
    if request.HasField("min_share"):
        queries = [_near_the_best(hits, request.min_share) for hits in queries]
        left = {hit.chunk_id for hits in queries for hit in hits}
        chunks = {id: chunk for id, chunk in chunks.items() if id in left}
    return m.Retrieval(head.store_id, queries, chunks)


def _near_the_best(hits: list[m.Hit], min_share: float) -> list[m.Hit]:
    """Return the hits with at least a share of the best score, which stand first; the best one stays.

    A server does that itself; one of an earlier version does not know the field, and answers with every hit.
    """
    least = min([hits[0].score, min_share * hits[0].score]) if hits else 0.0
    return [hit for hit in hits if hit.score >= least]


@understood()
def _fetched(request: service_pb2.FetchChunksRequest, answer: Answer, form: _tensors.Form) -> list[m.Chunk]:
    if [chunk.chunk_id for chunk in answer.header.chunks] != list(request.chunk_ids):
        raise odd("it has other chunks than were asked for")
    return [chunk_messages.read(chunk, answer.given(chunk.chunk_id, form)) for chunk in answer.header.chunks]


def _by_files(call: Call) -> Steps[Answer | None]:
    """Make a call for files; return its answer, or None where the server shares no files any more."""
    try:
        return (yield call)
    except FailedPrecondition as refusal:
        if not shares_nothing(refusal):
            raise
        return None


def shares_nothing(error: ServiceError) -> bool:
    """Tell whether a server refused a call for files because it shares no files with this client."""
    return error.reason == "NOT_SAME_HOST"
