"""The words of the service as plain values: banks, chunks, payloads, filters. Every layer uses them, and they know none
of the layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from memory_service.domain.tenants import DEFAULT_TENANT, bank_title

DType = Literal["bf16", "fp16", "fp32", "int32"]
Unit = Literal["chunks", "tokens", "bytes"]
PolicyKind = Literal["frequency", "recency_half", "reject", "lru"]
IndexKind = Literal["auto", "exact", "ivf"]
PayloadKind = Literal["layer_kv", "soft_tokens"]
EvictionReason = Literal["oldest", "least_retrieved", "oldest_half", "room", "least_recent"]

# A value of metadata: a number is an int of 64 bits or a finite float; a bool is no number.
Scalar = str | int | float | bool
Metadata = Mapping[str, Scalar]

ITEM_BYTES: Mapping[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4, "int32": 4}
# What a value of metadata counts that is no string: a double has as many digits.
NUMBER_BYTES = 24


def metadata_bytes(pairs: Metadata) -> int:
    """Estimate the bytes of metadata by their characters, because it takes as long to count bytes as to send them."""
    values = sum(len(value) if isinstance(value, str) else NUMBER_BYTES for value in pairs.values())
    return sum(map(len, pairs)) + values


@dataclass(frozen=True, slots=True)
class KvSpec:
    """Says which K-V a bank holds; a bank without layers holds vectors only."""

    reader_digest: str
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: DType | None
    # Says what differs when a digest does; not part of the identity.
    reader_parts: Mapping[str, str] = field(default_factory=dict, compare=False)
    # The width of the reader's input embeddings; 0 where the bank takes no soft tokens. It is not part of the identity
    # either: the digest implies it, and a bank that was made before there was a width is searched with a newer one.
    hidden_size: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """Says by which embeddings a bank is searched; the metric is the inner product."""

    embedder_digest: str
    dimension: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bounds what a bank holds: at most `limit` of its unit, beyond which chunks are evicted."""

    unit: Unit
    limit: int


@dataclass(frozen=True, slots=True)
class Policy:
    """Says how a full bank makes room; see `domain.eviction`. `lower` and `upper` are in percent of the live chunks,
    `target` is in percent of the capacity."""

    kind: PolicyKind = "frequency"
    lower: int = 10
    upper: int = 90
    target: int = 50


@dataclass(frozen=True, slots=True)
class Quota:
    """Bounds a bank for good: a write that would pass a bound is refused. 0 means unbounded."""

    chunks: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Expiry:
    """Says when a chunk expires: `ttl` microseconds after the writing, 0 for never; with `renew`, after the last
    counted retrieval."""

    ttl: int = 0
    renew: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts what a bank holds now, and what was done to its chunks since it was created."""

    chunks: int = 0
    tokens: int = 0
    bytes: int = 0
    chunks_written: int = 0
    chunks_evicted: int = 0
    chunks_deleted: int = 0
    chunks_quarantined: int = 0
    chunks_expired: int = 0


@dataclass(frozen=True, slots=True)
class Bank:
    """A bank of chunks: its specs, its bounds, its usage. Times are in microseconds since 1970."""

    name: str
    kv: KvSpec
    embedding: EmbeddingSpec
    capacity: Capacity | None
    policy: Policy
    metadata: Metadata
    bank_id: int = 0
    uid: str = ""
    created: int = 0
    usage: Usage = Usage()
    quota: Quota = Quota()
    # The expiry of chunks that state none.
    expiry: Expiry = Expiry()
    index: IndexKind = "auto"
    # Whose bank it is; the name is unique within it.
    tenant: str = DEFAULT_TENANT

    @property
    def title(self) -> str:
        """Return how logs and traces call the bank."""
        return bank_title(self.tenant, self.name)


def bank_bytes(bank: Bank) -> int:
    """Estimate the bytes of memory that the specs and metadata of a bank take."""
    words = metadata_bytes(bank.metadata) + metadata_bytes(bank.kv.reader_parts)
    return len(bank.name) + words + 8 * len(bank.kv.layers)


@dataclass(frozen=True, slots=True)
class Tensor:
    """Describes a tensor of a payload: `offset` in its object and `length` in bytes, `checksum` as xxh3-64."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    length: int
    checksum: int


class Producer(NamedTuple):
    """Says what has made a payload. It is a tuple, of which each write makes JSON three times: that of a dataclass is
    made by copying deeply, and took a sixth of the write of a small chunk."""

    method: str = ""
    version: str = ""
    context: str = ""
    adapter_digest: str = ""
    measured_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Payload:
    """Describes the K-V of a chunk; its kind goes with the names of its tensors. `seed`, `checksum` and the checksums
    of the tensors are those of the object, once it is stored."""

    tensors: tuple[Tensor, ...]
    producer: Producer
    seed: int = 0
    checksum: int = 0
    kind: PayloadKind = "layer_kv"
    # Of the object: its length, that of the header before the tensors, and the header's seeded xxh3-64 (None where an
    # earlier version has written it). A descriptor that is cut to some tensors keeps them.
    file_length: int = 0
    header_length: int = 0
    header_checksum: int | None = None

    def __hash__(self) -> int:
        """Return a hash of what tells payloads apart, because one of all tensors takes as long as using them."""
        return hash((self.seed, self.checksum, len(self.tensors)))

    @property
    def length(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.length for tensor in self.tensors)


@dataclass(slots=True, eq=False)
class Kept:
    """A place for what is made of the parts of a chunk that never change, as long as the chunk is kept in memory: here
    the bytes of their message."""

    message: bytes | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit that is written, retrieved, counted and evicted. `embedding` is float32 LE [d], `token_ids` int32 LE
    [n]; times are in microseconds since 1970."""

    key: bytes
    start: int
    original_length: int
    stored_length: int
    token_ids: bytes
    text: str
    metadata: Metadata
    embedding: bytes
    payload: Payload | None
    chunk_id: int = 0
    bank: str = ""
    created: int = 0
    retrieval_count: int = 0
    last_retrieved: int | None = None
    pinned: bool = False
    # On the disk, all that it takes; 0 where that is not known yet.
    stored_bytes: int = 0
    # A write that states none has None, and takes that of its bank.
    expiry: Expiry | None = None
    expires: int | None = None
    # Of a write: a chunk of this key that is there stands for this one, whatever its content, and one that is gone does
    # not count.
    if_absent: bool = False
    # Of a chunk that is kept in memory.
    kept: Kept | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Range:
    """A range of numbers, which has those within all bounds that are stated."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on one metadata key: its value is one of `values` and a number within `range`; without both, the key
    exists. With `negate` that must not hold."""

    key: str
    values: tuple[Scalar, ...] = ()
    negate: bool = False
    range: Range | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """Says which chunks count: those for which all holds that is stated. Ranges are half open; times are in
    microseconds since 1970. any_of: filters of which one holds too, where there are any. stretches: branches of
    sessions, each with the offset before which a chunk of it begins, or None; a chunk is of one, where there are
    any."""

    metadata: tuple[Condition, ...] = ()
    created_from: int | None = None
    created_before: int | None = None
    start_from: int | None = None
    start_before: int | None = None
    pinned: bool | None = None
    any_of: "tuple[Filter, ...]" = ()
    stretches: tuple[tuple[str, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class IndexStats:
    """The figures of the index of a bank now. `vectors` counts removed ones (`tombstones`) too; `recall` is that of the
    exact top 10, None where the index is exact."""

    kind: IndexKind = "exact"
    loaded: bool = False
    vectors: int = 0
    tombstones: int = 0
    segments: int = 0
    memory_bytes: int = 0
    recall: float | None = None


@dataclass(frozen=True, slots=True)
class Eviction:
    """A chunk that was evicted, or would be next; `evicted` is the time, None in the second case."""

    chunk_id: int
    reason: EvictionReason
    retrieval_count: int
    start: int
    stored_length: int
    created: int
    metadata: Metadata
    evicted: int | None = None
