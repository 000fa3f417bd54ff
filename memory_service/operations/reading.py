"""Reading banks: an answer joins what the search finds, the records of these chunks and their open payload files. This
file owns the counting of retrievals: one for each chunk and query, when the header that names the chunk goes out,
whatever becomes of the bytes behind it.

Whoever gets an answer closes its files.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from memory_service.domain import cancellation, validate
from memory_service.domain.answer_size import HeaderSize, HeaderTooLarge
from memory_service.domain.errors import ServiceError, bank_not_found, chunk_not_found, damaged_chunk, invalid
from memory_service.domain.model import Bank, Chunk, Filter
from memory_service.domain.scoring import Best
from memory_service.operations.banks import Banks
from memory_service.search import Selection
from memory_service.storage.base import DamagedError, Retrievals
from memory_service.storage.local.records import bank_rows, chunk_rows
from memory_service.storage.local.records.counts import Unwritten
from memory_service.storage.verify import OpenFiles, OpenPayload

MOST_QUERIES = 1024
# Different chunks of one answer, whose metadata must fit in one message.
MOST_CHUNKS = 10_000
# Seconds since a request id was last seen. They are more than the SDK lets pass between two calls of one retrieval: its
# attempts have two minutes, and as long has what may lie between (fetching what could not be read of files).
REMEMBERED_S = 300.0
# 34 MiB. At more than 660 retrievals a second the oldest are forgotten sooner.
MOST_REMEMBERED = 200_000


class Hit(NamedTuple):
    """One chunk for one query."""

    chunk_id: int
    score: float
    bank: Bank


@dataclass(frozen=True, slots=True)
class Query:
    """What a caller asks to retrieve. `vectors` are float32 LE [n, d]; `held` maps the ids of chunks that the caller
    has to their payload checksums, and is valid for `store_id`."""

    banks: Sequence[str]
    reader_digest: str
    embedder_digest: str
    vectors: bytes
    # The dimension of each vector, as the caller states it; 0 where he does not.
    dimension: int
    top_k: int
    min_score: float | None = None
    layers: Sequence[int] = ()
    store_id: str = ""
    held: Mapping[int, int] = field(default_factory=dict)
    omit_payload: bool = False
    skip_count: bool = False
    request_id: bytes = b""
    filter: Filter | None = None


class Found(NamedTuple):
    """A chunk whose descriptor is cut to the layers asked for; `sent` tells whether its bytes are to be sent."""

    chunk: Chunk
    bank: Bank
    sent: bool
    file: OpenPayload | None = None

    @property
    def length(self) -> int:
        """The bytes of K-V to be sent."""
        return self.chunk.payload.length if self.sent and self.chunk.payload else 0


class Opened(NamedTuple):
    """What is left of a found chunk when only its bytes are still to be sent."""

    chunk_id: int
    bank: Bank
    file: OpenPayload


def opened(found: Iterable[Found]) -> list[Opened]:
    """Return those whose bytes are to be sent."""
    return [Opened(item.chunk.chunk_id, item.bank, item.file) for item in found if item.file is not None]


def close(found: Iterable[Found | Opened | None]) -> None:
    """Close the files."""
    for item in found:
        if item is not None and item.file is not None:
            item.file.close()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: the hits of each query, and every chunk of them once, ascending by id."""

    hits: list[list[Hit]]
    found: list[Found]


class Recall:
    """Answers retrievals and fetches."""

    def __init__(self, banks: Banks, max_answer_bytes: int) -> None:
        self._banks = banks
        self._records = banks.engine.records
        self._max_answer_bytes = max_answer_bytes
        self._counted = RecentRequests()
        self._open_files = OpenFiles()
        self._stages = banks.metrics.stages

    def retrieval(self, query: Query) -> "Retrieval":
        """Begin a retrieval: check the query and search.

        Errors: BANK_NOT_FOUND, BANKS_DIFFER, READER_MISMATCH, EMBEDDER_MISMATCH, INVALID_FIELD, NOT_FINITE, TOO_LARGE.
        """
        return Retrieval(self, query, *self._check(query))

    def answer(self, retrieval: "Retrieval", most_header: int, *, opened: bool = True) -> Answer:
        """Load and open what a retrieval has found; call `count` when the answer goes out.

        most_header: the bytes that the header of the answer may have. opened: False for a caller that opens the files
        itself.

        Errors: TOO_LARGE (HeaderTooLarge among them, and then the next call may allow more), CHECKSUM_MISMATCH (the
        damaged chunk is quarantined; the next retrieval answers without it).
        """
        while True:
            answer = self._load(retrieval, most_header)
            found = self._open_all(answer.found) if opened else list[Found | None](answer.found)
            if None not in found:
                return Answer(answer.hits, [item for item in found if item is not None])
            close(found)
            # Evicted between search and opening: the next best takes its place.
            gone = {item.chunk.chunk_id for item, opened in zip(answer.found, found, strict=True) if opened is None}
            retrieval.search_without(gone)

    def _load(self, retrieval: "Retrieval", most_header: int) -> Answer:
        """Load the chunks of the hits, without bytes of K-V. Errors: those of `answer`."""
        query = retrieval.query
        while True:
            unwritten = self._records.counts.unwritten()
            size = HeaderSize(most_header, sum(map(len, retrieval.hits)))
            with self._banks.without_flawed(), self._stages["load"].time(), self._records.read() as connection:
                chunks = _chunks(connection, retrieval.hits, query.layers, unwritten, size)
            gone = {hit.chunk_id for row in retrieval.hits for hit in row} - chunks.keys()
            if not gone:
                break
            # Removed from the records and not yet from the index, or expired just now: the next best takes its place.
            retrieval.search_without(gone)
        held = query.held if query.store_id == self._records.store_id else {}
        found = []
        for chunk_id, (bank, chunk) in sorted(chunks.items()):
            payload = chunk.payload
            sent = not query.omit_payload and payload is not None and payload.checksum != held.get(chunk_id)
            found.append(Found(chunk, bank, sent))
        self._check_size(found)
        return Answer(retrieval.hits, found)

    def search(
        self, query: Query, banks: Sequence[Bank], vectors: NDArray[np.float32], gone: Collection[int]
    ) -> list[list[Hit]]:
        """Find the best chunks for each vector over all banks, without those that are `gone`. Errors: TOO_LARGE."""
        with self._banks.without_flawed():
            indexes = [self._banks.indexes.get(bank) for bank in banks]
        unwritten = self._records.counts.unwritten()
        with self._banks.without_flawed(), self._stages["search"].time(), self._records.read() as connection:
            best = []
            for bank, index in zip(banks, indexes, strict=True):
                cancellation.check()
                selection = _selection(connection, bank, query, gone, unwritten)
                read = partial(chunk_rows.vectors, connection, bank)
                best.append(index.search(vectors, query.top_k, read, selection))
        hits = [_merged(banks, row, query) for row in zip(*best, strict=True)]
        total = len({hit.chunk_id for row in hits for hit in row})
        if total > MOST_CHUNKS:
            text = f"{total} different chunks were found; ask for at most {MOST_CHUNKS} at once"
            raise ServiceError("TOO_LARGE", text, limit=MOST_CHUNKS, size=total)
        return hits

    def count(self, query: Query, answer: Answer) -> None:
        """Count every hit of an answer, unless its request was counted before."""
        self._banks.metrics.queried([hit.score for hit in row] for row in answer.hits)
        if query.skip_count or not self._counted.first(query.request_id):
            return
        now = self._records.clock.now_us()
        counts = Counter(hit.chunk_id for row in answer.hits for hit in row)
        self._records.counts.add({chunk_id: Retrievals(count, now, now) for chunk_id, count in counts.items()})

    def fetch(
        self,
        name: str,
        reader_digest: str,
        chunk_ids: Sequence[int],
        layers: Sequence[int],
        most_header: int,
        *,
        opened: bool = True,
    ) -> list[Found]:
        """Load and open chunks by id, in the order asked for. Errors: CHUNK_NOT_FOUND, and those of `retrieval` and
        `answer`."""
        bank = self._banks.named(name)
        validate.reader(bank, reader_digest, required=bool(bank.kv.layers))
        validate.layers(bank, layers)
        if not 1 <= len(chunk_ids) <= validate.MOST_IDS:
            raise invalid("chunk_ids", f"must have 1 to {validate.MOST_IDS} ids")
        unwritten = self._records.counts.unwritten()
        with self._banks.without_flawed(), self._stages["load"].time(), self._records.read() as connection:
            chunks = _loaded(connection, [(bank, Counter(chunk_ids))], layers, unwritten, HeaderSize(most_header))
        for chunk_id in chunk_ids:
            if chunk_id not in chunks:
                raise chunk_not_found(name, chunk_id)
        wanted = [Found(chunks[i][1], bank, chunks[i][1].payload is not None) for i in chunk_ids]
        self._check_size(wanted)
        found = self._open_all(wanted) if opened else list[Found | None](wanted)
        for chunk_id, item in zip(chunk_ids, found, strict=True):
            if item is None:
                close(found)
                raise chunk_not_found(name, chunk_id)
        return [item for item in found if item is not None]

    def _check(self, query: Query) -> tuple[list[Bank], NDArray[np.float32]]:
        validate.names("banks", query.banks)
        banks = [self._banks.named(name) for name in query.banks]
        for bank in banks[1:]:
            if (bank.kv, bank.embedding) != (banks[0].kv, banks[0].embedding):
                text = f"banks {banks[0].name} and {bank.name} have different specs"
                raise ServiceError("BANKS_DIFFER", text, first=banks[0].name, second=bank.name)
        validate.reader(banks[0], query.reader_digest, required=bool(banks[0].kv.layers) and not query.omit_payload)
        validate.embedder(banks[0], query.embedder_digest)
        validate.layers(banks[0], query.layers)
        if query.min_score is not None and np.isnan(query.min_score):
            raise invalid("min_score", "must be a number")
        if len(query.request_id) not in (0, 16):
            raise invalid("request_id", "must have 16 bytes")
        validate.dimension(banks[0], query.dimension)
        vectors = validate.vectors(query.vectors, banks[0].embedding.dimension, "queries")
        if len(vectors) > MOST_QUERIES:
            raise invalid("queries", f"must be at most {MOST_QUERIES}")
        validate.hits(len(vectors), query.top_k)
        return banks, vectors

    def _check_size(self, found: Sequence[Found]) -> None:
        size = sum(item.length for item in found)
        if size > self._max_answer_bytes:
            text = f"the answer would have {size} bytes of K-V; ask for fewer chunks or layers"
            raise ServiceError("TOO_LARGE", text, limit=self._max_answer_bytes, size=size)

    def _open_all(self, found: Sequence[Found]) -> list[Found | None]:
        """Open the files of chunks; None stands for a chunk that is gone by now. Errors: CHECKSUM_MISMATCH."""
        opened: list[Found | None] = []
        try:
            with self._stages["open"].time():
                opened.extend(map(self._open, found))
        except BaseException:
            close(opened)
            raise
        return opened

    def _open(self, found: Found) -> Found | None:
        bank, chunk = found.bank, found.chunk
        if not found.sent or chunk.payload is None:
            return found
        try:
            path = self._banks.engine.objects.file(bank.uid, chunk.chunk_id)
            return found._replace(file=OpenPayload(path, chunk.payload, self._open_files))
        except (FileNotFoundError, DamagedError) as error:
            if (refusal := self.damaged(bank, chunk.chunk_id)) is None:
                return None
            raise refusal from error

    def damaged(self, bank: Bank, chunk_id: int) -> ServiceError | None:
        """Quarantine a chunk whose file is damaged or missing, and return the error CHECKSUM_MISMATCH.

        Where the chunk itself is gone, nothing is wrong, and None is returned; where its bank is gone, whose files go
        before its last rows, BANK_NOT_FOUND is.
        """
        unwritten = self._records.counts.unwritten()
        with self._banks.without_flawed(), self._records.read() as connection:
            if bank_rows.usage(connection, bank.bank_id) is None:
                return bank_not_found(bank.name)
            if chunk_rows.get(connection, bank, chunk_id, unwritten) is None:
                return None
        self._banks.quarantine(bank, chunk_id)
        return damaged_chunk(chunk_id)


class Retrieval:
    """A retrieval that has been searched for. It is loaded later, because that may have to wait for a turn."""

    def __init__(self, recall: Recall, query: Query, banks: Sequence[Bank], vectors: NDArray[np.float32]) -> None:
        """Search for the vectors of the query. Errors: TOO_LARGE."""
        self.query = query
        self._recall = recall
        self._banks, self._vectors = banks, vectors
        self._gone: set[int] = set()
        self.search_without(())

    def search_without(self, gone: Iterable[int]) -> None:
        """Search again, without these chunks and those of earlier calls. Errors: TOO_LARGE."""
        self._gone.update(gone)
        self.hits = self._recall.search(self.query, self._banks, self._vectors, self._gone)


class RecentRequests:
    """Remembers the request ids of the last minutes, so that a repeated call counts once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, float] = OrderedDict()  # when it was last seen, ascending

    def first(self, request_id: bytes) -> bool:
        """Tell whether this id was not seen within REMEMBERED_S, and remember it. An empty id is always new."""
        if not request_id:
            return True
        now = time.monotonic()
        with self._lock:
            while self._seen and next(iter(self._seen.values())) < now - REMEMBERED_S:
                self._seen.popitem(last=False)
            new = request_id not in self._seen
            self._seen[request_id] = now
            self._seen.move_to_end(request_id)
            if len(self._seen) > MOST_REMEMBERED:
                self._seen.popitem(last=False)
            return new


def _selection(
    connection: Connection, bank: Bank, query: Query, gone: Collection[int], unwritten: Unwritten
) -> Selection:
    excluded = chunk_rows.expired_ids(connection, bank.bank_id, unwritten)
    if gone:
        excluded = np.union1d(excluded, np.array(list(gone), np.int64))
    allowed = None if query.filter is None else chunk_rows.matching_ids(connection, bank, query.filter)
    return Selection(allowed, excluded)


def _chunks(
    connection: Connection,
    hits: Sequence[Sequence[Hit]],
    layers: Sequence[int],
    unwritten: Unwritten,
    size: HeaderSize,
) -> dict[int, tuple[Bank, Chunk]]:
    """Load every chunk of the hits, with its bank. Errors: HeaderTooLarge."""
    wanted: dict[str, tuple[Bank, dict[int, int]]] = {}
    for row in hits:
        for hit in row:
            wanted.setdefault(hit.bank.name, (hit.bank, {}))[1][hit.chunk_id] = 1
    return _loaded(connection, list(wanted.values()), layers, unwritten, size)


def _loaded(
    connection: Connection,
    wanted: Sequence[tuple[Bank, Mapping[int, int]]],
    layers: Sequence[int],
    unwritten: Unwritten,
    size: HeaderSize,
) -> dict[int, tuple[Bank, Chunk]]:
    """Load chunks by id with their bank, their descriptors cut to `layers`.

    wanted: for each bank, the ids and how many times the header names each. Errors: HeaderTooLarge, as soon as the
    chunks are too large together; it says how large all of them are.
    """
    found: dict[int, tuple[Bank, Chunk]] = {}
    try:
        for bank, times in wanted:
            for chunk in chunk_rows.found(connection, bank, times, unwritten):
                cut = _only(chunk, layers)
                found[chunk.chunk_id] = (bank, cut)
                size.add(cut, times[chunk.chunk_id])
    except HeaderTooLarge:
        found.clear()
        all_times = {chunk_id: count for _, times in wanted for chunk_id, count in times.items()}
        raise size.too_large(*chunk_rows.message_bytes(connection, all_times)) from None
    return found


def _merged(banks: Sequence[Bank], best: Sequence[Best], query: Query) -> list[Hit]:
    """Return the best hits over all banks, by descending score, and by id where scores are equal."""
    hits = [
        Hit(chunk_id, score, bank)
        for bank, some in zip(banks, best, strict=True)
        for chunk_id, score in zip(some.ids.tolist(), some.scores.tolist(), strict=True)
        if query.min_score is None or score >= query.min_score
    ]
    if len(banks) > 1:
        hits.sort(key=lambda hit: (-hit.score, hit.chunk_id))
        del hits[query.top_k :]
    return hits


def _only(chunk: Chunk, layers: Sequence[int]) -> Chunk:
    """Return the chunk with its descriptor cut to some layers; the payload's checksum is still that of the whole.

    The descriptor of soft tokens is not cut, because they belong to no layer.
    """
    if not layers or chunk.payload is None or chunk.payload.kind == "soft_tokens":
        return chunk
    wanted = {str(layer) for layer in layers}
    tensors = tuple(tensor for tensor in chunk.payload.tensors if tensor.name.rpartition(".")[2] in wanted)
    return replace(chunk, payload=replace(chunk.payload, tensors=tensors))
