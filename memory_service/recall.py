"""Reading banks: search, records and verified bytes in one answer. Owns counting: +1 a chunk returned per query."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memory_service import records, validate
from memory_service.bank import Banks, chunk_not_found
from memory_service.domain import Bank, Chunk, Payload
from memory_service.errors import (
    DATA_LOSS,
    FAILED_PRECONDITION,
    RESOURCE_EXHAUSTED,
    ServiceError,
    invalid,
)
from memory_service.payloads import DamagedError
from memory_service.records import now_us

MOST_QUERIES = 1024
# Different ones of one answer, whose metadata must fit in one message.
MOST_CHUNKS = 10_000
REMEMBERED_S = 60.0


class Hit(NamedTuple):
    """One chunk for one query."""

    chunk_id: int
    score: float
    bank: Bank


@dataclass(frozen=True, slots=True)
class Query:
    """One retrieval; `vectors` float32 LE [n, d]; `held`: chunk id -> payload checksum, valid for `store_id`."""

    banks: Sequence[str]
    reader_digest: str
    embedder_digest: str
    vectors: bytes
    top_k: int
    min_score: float | None = None
    layers: Sequence[int] = ()
    store_id: str = ""
    held: Mapping[int, int] = field(default_factory=dict)
    omit_payload: bool = False
    skip_count: bool = False
    request_id: bytes = b""


class Found(NamedTuple):
    """A chunk, its descriptor cut to the layers asked for, and its bytes (None: not sent)."""

    chunk: Chunk
    parts: list[bytes] | None


@dataclass(frozen=True, slots=True)
class Answer:
    """Hits a query, and every chunk once, ascending by id."""

    hits: list[list[Hit]]
    found: list[Found]


class Recall:
    """Retrieve and fetch."""

    def __init__(self, banks: Banks, max_answer_bytes: int) -> None:
        self._banks = banks
        self._records = banks.records
        self._max_answer_bytes = max_answer_bytes
        self._counted = RecentRequests()

    def retrieve(self, query: Query) -> Answer:
        """Search, read, verify, count.

        Errors: BANK_NOT_FOUND, BANKS_DIFFER, READER_MISMATCH, EMBEDDER_MISMATCH, INVALID_FIELD, NOT_FINITE, TOO_LARGE,
        CHECKSUM_MISMATCH (the damaged chunk is quarantined; the next call answers without it).
        """
        banks, vectors = self._check(query)
        gone: set[int] = set()
        while True:
            hits = [self._search(banks, vector, query, gone) for vector in vectors]
            found = self._load(hits, query)
            if all(item is not None for item in found.values()):
                break
            # Evicted between search and read: the next best takes its place.
            gone.update(chunk_id for chunk_id, item in found.items() if item is None)
        if not query.skip_count and self._counted.first(query.request_id):
            now = now_us()
            counts = Counter(hit.chunk_id for row in hits for hit in row)
            self._records.counts.add({chunk_id: (count, now) for chunk_id, count in counts.items()})
        return Answer(hits, [item for _, item in sorted(found.items()) if item is not None])

    def fetch(self, name: str, reader_digest: str, chunk_ids: Sequence[int], layers: Sequence[int]) -> list[Found]:
        """Chunks by id, in the order asked for. Errors: as `retrieve`, CHUNK_NOT_FOUND."""
        bank = self._banks.named(name)
        validate.reader(bank, reader_digest, required=bool(bank.kv.layers))
        validate.layers(bank, layers)
        if not 1 <= len(chunk_ids) <= validate.MOST_IDS:
            raise invalid("chunk_ids", f"must have 1 to {validate.MOST_IDS} ids")
        with self._records.read() as connection:
            chunks = records.chunks(connection, bank, set(chunk_ids))
        for chunk_id in chunk_ids:
            if chunk_id not in chunks:
                raise chunk_not_found(name, chunk_id)
        cut = {chunk_id: _only(chunk, layers) for chunk_id, chunk in chunks.items()}
        self._check_size([cut[chunk_id] for chunk_id in chunk_ids])
        found = {chunk_id: self._read(bank, chunk) for chunk_id, chunk in cut.items()}
        answer = []
        for chunk_id in chunk_ids:
            item = found[chunk_id]
            if item is None:
                raise chunk_not_found(name, chunk_id)
            answer.append(item)
        return answer

    def _check(self, query: Query) -> tuple[list[Bank], NDArray[np.float32]]:
        if not query.banks or len(set(query.banks)) != len(query.banks):
            raise invalid("banks", "must name at least one bank, each once")
        banks = [self._banks.named(name) for name in query.banks]
        for bank in banks[1:]:
            if (bank.kv, bank.embedding) != (banks[0].kv, banks[0].embedding):
                text = f"banks {banks[0].name} and {bank.name} have different specs"
                raise ServiceError(FAILED_PRECONDITION, "BANKS_DIFFER", text, first=banks[0].name, second=bank.name)
        validate.reader(banks[0], query.reader_digest, required=bool(banks[0].kv.layers) and not query.omit_payload)
        validate.embedder(banks[0], query.embedder_digest)
        validate.layers(banks[0], query.layers)
        if not 1 <= query.top_k <= validate.MOST_IDS:
            raise invalid("top_k", f"must be from 1 to {validate.MOST_IDS}")
        if query.min_score is not None and np.isnan(query.min_score):
            raise invalid("min_score", "must be a number")
        if len(query.request_id) not in (0, 16):
            raise invalid("request_id", "must have 16 bytes")
        vectors = validate.vectors(query.vectors, banks[0].embedding.dimension, "queries")
        if len(vectors) > MOST_QUERIES:
            raise invalid("queries", f"must be at most {MOST_QUERIES}")
        return banks, vectors

    def _search(self, banks: Sequence[Bank], vector: NDArray[np.float32], query: Query, gone: set[int]) -> list[Hit]:
        """Score descending, ties by lower id, over all banks."""
        hits = []
        for bank in banks:
            ids, scores = self._banks.index(bank).search(vector, query.top_k + len(gone))
            hits += [Hit(i, s, bank) for i, s in zip(ids.tolist(), scores.tolist(), strict=True) if i not in gone]
        if query.min_score is not None:
            hits = [hit for hit in hits if hit.score >= query.min_score]
        return sorted(hits, key=lambda hit: (-hit.score, hit.chunk_id))[: query.top_k]

    def _load(self, hits: Sequence[Sequence[Hit]], query: Query) -> dict[int, Found | None]:
        """Every chunk of the hits; None where it is gone."""
        owner = {hit.chunk_id: hit.bank for row in hits for hit in row}
        if len(owner) > MOST_CHUNKS:
            text = f"{len(owner)} different chunks were found; ask for at most {MOST_CHUNKS} at once"
            raise ServiceError(RESOURCE_EXHAUSTED, "TOO_LARGE", text, limit=MOST_CHUNKS, size=len(owner))
        chunks: dict[int, Chunk] = {}
        with self._records.read() as connection:
            for bank in {bank.bank_id: bank for bank in owner.values()}.values():
                wanted = [chunk_id for chunk_id, its in owner.items() if its is bank]
                chunks |= records.chunks(connection, bank, wanted)
        cut = {chunk_id: _only(chunk, query.layers) for chunk_id, chunk in chunks.items()}
        held = query.held if query.store_id == self._records.store_id else {}
        sent = {i for i, chunk in cut.items() if not query.omit_payload and not _is_held(chunk.payload, held.get(i))}
        self._check_size([cut[chunk_id] for chunk_id in sent])
        found: dict[int, Found | None] = dict.fromkeys(owner)
        for chunk_id, chunk in cut.items():
            found[chunk_id] = self._read(owner[chunk_id], chunk) if chunk_id in sent else Found(chunk, None)
        return found

    def _check_size(self, chunks: Sequence[Chunk]) -> None:
        size = sum(chunk.payload.length for chunk in chunks if chunk.payload)
        if size > self._max_answer_bytes:
            text = f"the answer would have {size} bytes of K-V; ask for fewer chunks or layers"
            raise ServiceError(RESOURCE_EXHAUSTED, "TOO_LARGE", text, limit=self._max_answer_bytes, size=size)

    def _read(self, bank: Bank, chunk: Chunk) -> Found | None:
        """With verified bytes; None when the chunk went meanwhile. Errors: CHECKSUM_MISMATCH."""
        if chunk.payload is None:
            return Found(chunk, None)
        try:
            return Found(chunk, self._banks.payloads.read(bank.uid, chunk.chunk_id, chunk.payload))
        except (FileNotFoundError, DamagedError) as error:
            with self._records.read() as connection:
                if records.chunk(connection, bank, chunk.chunk_id) is None:
                    return None
            self._banks.quarantine(bank, chunk.chunk_id)
            text = f"stored bytes of chunk {chunk.chunk_id} are damaged; it is quarantined"
            raise ServiceError(DATA_LOSS, "CHECKSUM_MISMATCH", text, chunk_id=chunk.chunk_id) from error


class RecentRequests:
    """Request ids of the last minute, so that a repeated call counts once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, float] = OrderedDict()

    def first(self, request_id: bytes) -> bool:
        """Whether this id was not seen within REMEMBERED_S; remembers it. An empty id is always new."""
        if not request_id:
            return True
        now = time.monotonic()
        with self._lock:
            while self._seen and next(iter(self._seen.values())) < now - REMEMBERED_S:
                self._seen.popitem(last=False)
            if request_id in self._seen:
                return False
            self._seen[request_id] = now
            return True


def _only(chunk: Chunk, layers: Sequence[int]) -> Chunk:
    """The chunk with its descriptor cut to some layers; the payload's checksum still names the whole."""
    if not layers or chunk.payload is None:
        return chunk
    wanted = {str(layer) for layer in layers}
    tensors = tuple(tensor for tensor in chunk.payload.tensors if tensor.name.rpartition(".")[2] in wanted)
    return replace(chunk, payload=replace(chunk.payload, tensors=tensors))


def _is_held(payload: Payload | None, checksum: int | None) -> bool:
    return payload is not None and payload.checksum == checksum
