"""What is asked when banks are read, and what is found: plain values, on their way from the search to the transport."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from memory_service.domain.model import Bank, Chunk, Filter
from memory_service.storage.verify import VerifiedPayload


@dataclass(frozen=True, slots=True)
class Query:
    """A retrieval as its caller asks for it, from banks of its tenant.

    vectors: float32 LE [n, dimension]; a dimension of 0 is not stated. held: the payload checksums of chunks that the
    caller has, by chunk id; it counts only where `store_id` is that of the store. request_id: 16 bytes, or empty.
    """

    tenant: str
    banks: Sequence[str]
    reader_digest: str
    embedder_digest: str
    vectors: bytes
    dimension: int
    top_k: int
    min_score: float | None = None
    min_share: float | None = None
    layers: Sequence[int] = ()
    store_id: str = ""
    held: Mapping[int, int] = field(default_factory=dict)
    omit_payload: bool = False
    skip_count: bool = False
    request_id: bytes = b""
    filter: Filter | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Chunks of one bank of its tenant that a caller asks for by id; `layers` are those whose K-V it wants, all where
    it names none."""

    tenant: str
    bank: str
    reader_digest: str
    chunk_ids: Sequence[int]
    layers: Sequence[int] = ()


class Hit(NamedTuple):
    """A chunk that was found for a query, with its score."""

    chunk_id: int
    score: float
    bank: Bank


class Found(NamedTuple):
    """A chunk whose descriptor is cut to the layers asked for. `sent` tells whether its bytes are to be sent; they come
    from `file`, where it is open."""

    chunk: Chunk
    bank: Bank
    sent: bool
    file: VerifiedPayload | None = None

    @property
    def length(self) -> int:
        """Return the bytes of K-V to be sent."""
        return self.chunk.payload.length if self.sent and self.chunk.payload else 0


class Opened(NamedTuple):
    """What is left of a found chunk when only its bytes are still to be sent."""

    chunk_id: int
    bank: Bank
    file: VerifiedPayload


@dataclass(frozen=True, slots=True)
class Answer:
    """The hits of each query, and every chunk of them once, ascending by id."""

    hits: list[list[Hit]]
    found: list[Found]


def opened(found: Iterable[Found]) -> list[Opened]:
    """Return those of the chunks whose bytes are to be sent."""
    return [Opened(item.chunk.chunk_id, item.bank, item.file) for item in found if item.file is not None]


def close(found: Iterable[Found | Opened | None]) -> None:
    """Close the files of chunks; None stands for a chunk that is gone."""
    for item in found:
        if item is not None and item.file is not None:
            item.file.close()
