"""Answers of retrievals and fetches, as bytes. This file owns what an answer says, and that a retrieval is counted when
its header is made, whichever way its bytes of K-V go: over the stream, or as names of files to a caller on this host.

Each method finds what the answer is made of, and returns what loads it (`turns.Load`). All of it blocks, for storage
threads and the threads of direct calls.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from google.protobuf.message import Message

from kvbank.v1 import service_pb2 as pb
from kvbank.wire import frames
from memory_service.api.calls.turns import Load
from memory_service.api.messages import convert
from memory_service.api.messages.status import check_size
from memory_service.api.same_host import SameHost
from memory_service.domain.access import Caller
from memory_service.domain.errors import ServiceError
from memory_service.observe.metrics import Metrics
from memory_service.operations.banks import Banks
from memory_service.operations.found import Answer, Found, Opened, Query, Wanted, close, opened
from memory_service.operations.reading import Retrieval

# The number of this field in every answer that has a header.
_HEADER = pb.RetrieveResponse.HEADER_FIELD_NUMBER


class Streamed(NamedTuple):
    """An answer over the stream: the bytes of its header, and the open files whose bytes come behind it, which the
    caller closes."""

    header: bytes
    files: list[Opened]


class Answers:
    """Makes the answers of retrievals and fetches. Threads share the object."""

    def __init__(self, banks: Banks, same_host: SameHost | None, most_bytes: int, metrics: Metrics) -> None:
        """Make answers of what the banks hold. same_host: where callers may read files themselves; None where they may
        not. most_bytes: of a header."""
        self._banks = banks
        self._recall = banks.recall
        self._same_host = same_host
        self._most_bytes = most_bytes
        self._sent_as_files = metrics.sent_bytes.labels("file")

    def retrieved(self, caller: Caller, request: pb.RetrieveRequest) -> Load[Streamed]:
        """Search for the best chunks. Errors: those of `Recall.retrieval`; of the load, those of `Recall.answer`."""
        return partial(self._load_hits, self._recall.retrieval(_query(caller, request)))

    def fetched(self, caller: Caller, request: pb.FetchChunksRequest) -> Load[Streamed]:
        """Prepare to load chunks by id. Errors of the load: those of `Recall.fetch`."""
        return partial(self._load_chunks, caller, request)

    def retrieved_files(self, caller: Caller, request: pb.RetrieveFilesRequest) -> Load[bytes]:
        """Do as `retrieved` for a caller that reads the files. Errors: NOT_SAME_HOST too."""
        self._check_shares(caller, request.proof)
        return partial(self._load_hits_of_files, self._recall.retrieval(_query(caller, request.retrieve)))

    def fetched_files(self, caller: Caller, request: pb.FetchFilesRequest) -> Load[bytes]:
        """Do as `fetched` for a caller that reads the files. Errors: NOT_SAME_HOST too."""
        self._check_shares(caller, request.proof)
        return partial(self._load_chunks_of_files, caller, request.fetch)

    def _check_shares(self, caller: Caller, proof: bytes) -> None:
        """Refuse a caller that may not read the files: only their owner may, whose they are anyway. Errors:
        NOT_SAME_HOST."""
        if self._same_host is None or not caller.is_owner or not self._same_host.proven(proof):
            text = "this server shares its files only with a client that has read its nonce"
            raise ServiceError("NOT_SAME_HOST", text)

    def _load_hits(self, retrieval: Retrieval, most_bytes: int) -> Streamed:
        answer = self._recall.answer(retrieval, most_bytes)
        with _closing_after_errors(answer.found):
            header = self._hits(answer)
            self._recall.count(retrieval.query, answer)
            return Streamed(header, opened(answer.found))

    def _load_chunks(self, caller: Caller, request: pb.FetchChunksRequest, most_bytes: int) -> Streamed:
        found = self._fetch(caller, request, most_bytes)
        with _closing_after_errors(found):
            return Streamed(self._chunks(found), opened(found))

    def _load_hits_of_files(self, retrieval: Retrieval, most_bytes: int) -> bytes:
        answer = self._recall.answer(retrieval, most_bytes, opened=False)
        made = self._hits(answer, pb.RetrieveFilesResponse(files=map(self._recall.path, answer.found)))
        self._recall.count(retrieval.query, answer)
        self._sent_as_files.inc(sum(item.length for item in answer.found))
        return made

    def _load_chunks_of_files(self, caller: Caller, request: pb.FetchChunksRequest, most_bytes: int) -> bytes:
        found = self._fetch(caller, request, most_bytes, opened=False)
        made = self._chunks(found, pb.FetchFilesResponse(files=map(self._recall.path, found)))
        self._sent_as_files.inc(sum(item.length for item in found))
        return made

    def _fetch(
        self, caller: Caller, request: pb.FetchChunksRequest, most_bytes: int, *, opened: bool = True
    ) -> list[Found]:
        ids, layers = list(request.chunk_ids), list(request.layers)
        wanted = Wanted(caller.tenant, request.bank, request.reader_digest, ids, layers)
        return self._recall.fetch(wanted, most_bytes, opened=opened)

    def _hits(self, answer: Answer, files: Message | None = None) -> bytes:
        head = pb.RetrieveHeader(
            store_id=self._banks.store_id,
            queries=[
                pb.QueryHits(hits=[pb.Hit(chunk_id=hit.chunk_id, score=hit.score) for hit in row])
                for row in answer.hits
            ],
            sent=[item.sent for item in answer.found],
        )
        return answer_bytes(head, answer.found, files, self._most_bytes)

    def _chunks(self, found: Sequence[Found], files: Message | None = None) -> bytes:
        head = pb.FetchChunksHeader(store_id=self._banks.store_id)
        return answer_bytes(head, found, files, self._most_bytes)


def answer_bytes(head: Message, found: Sequence[Found], files: Message | None, most_bytes: int) -> bytes:
    """Serialize an answer whose `header` is `head` with the chunks that were found, and which has the `files` too.

    The header is made a chunk at a time, because a message of all chunks would be copied several times, and no other
    thread could run during each copy. Errors: TOO_LARGE for more than `most_bytes`.
    """
    field = head.DESCRIPTOR.fields_by_name["chunks"].number
    parts = [head.SerializeToString()]
    for item in found:
        chunk = convert.chunk_bytes(item.chunk)
        parts += (frames.prefix(field, len(chunk)), chunk)
    end = b"" if files is None else files.SerializeToString()
    size = sum(map(len, parts))
    check_size(size + len(end), most_bytes)
    return b"".join((frames.prefix(_HEADER, size), *parts, end))


@contextmanager
def _closing_after_errors(found: Sequence[Found]) -> Iterator[None]:
    """Close the files of chunks where the block fails."""
    try:
        yield
    except BaseException:
        close(found)
        raise


def _query(caller: Caller, request: pb.RetrieveRequest) -> Query:
    """Read what the request of a caller asks for. Errors: INVALID_FIELD."""
    return Query(
        tenant=caller.tenant,
        banks=list(request.banks),
        reader_digest=request.reader_digest,
        embedder_digest=request.embedder_digest,
        vectors=request.queries,
        dimension=request.dimension,
        top_k=request.top_k or 8,
        min_score=request.min_score if request.HasField("min_score") else None,
        min_share=request.min_share if request.HasField("min_share") else None,
        layers=list(request.layers),
        store_id=request.store_id,
        held={held.chunk_id: held.checksum for held in request.held},
        omit_payload=request.omit_payload,
        skip_count=request.skip_count,
        request_id=request.request_id,
        filter=convert.filter_(request.filter) if request.HasField("filter") else None,
    )
