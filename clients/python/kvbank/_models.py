"""Models are what goes into and comes out of a client: plain frozen values. Nothing here does I/O.

Sizes are in bytes, lengths in tokens, times are aware datetimes in UTC.
"""

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import EllipsisType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvbank._access_models import Tenant
from kvbank._arguments import (
    checked_metadata,
    each,
    finite,
    flag,
    instance,
    int32,
    integer,
    invalid,
    items,
    mapping,
    scalar,
    shown,
)
from kvbank._arrays import Array, is_array
from kvbank._exceptions import InvalidArgument
from kvbank.wire.scalars import Scalar

TensorKind = Literal["numpy", "torch"]
# The words of the enums of the protocol, which `kvbank._calls.enums` looks up by these.
DataType = Literal["bf16", "fp16", "fp32", "int32"]
Metric = Literal["inner_product"]
PolicyKind = Literal["frequency", "recency_half", "reject", "lru"]
IndexKind = Literal["auto", "exact", "ivf"]
PayloadKind = Literal["layer_kv", "soft_tokens"]


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The keys and values that a bank holds.

    reader_digest: of the model that will attend to them; every write and read states it.
    layers: memory layers, counted from 0, ascending.
    dtype: "bf16", "fp16" or "fp32".
    reader_parts: what the digest was made of, so that a refusal can say what differs.
    hidden_size: of the model's input embeddings, for chunks of soft tokens; 0 is a bank that takes none.
    """

    reader_digest: str
    layers: Sequence[int]
    kv_heads: int
    head_dim: int
    dtype: str = "bf16"
    reader_parts: Mapping[str, str] = field(default_factory=dict)
    hidden_size: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(each("layers", self.layers, int32)))


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """The embeddings by which a bank is searched."""

    embedder_digest: str
    dimension: int
    metric: str = "inner_product"


@dataclass(frozen=True, slots=True)
class Capacity:
    """A bound on one of: chunks, stored tokens, bytes of all that chunks take on the disk."""

    chunks: int | None = None
    tokens: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if sum(limit is not None for limit in (self.chunks, self.tokens, self.bytes)) != 1:
            raise _nonsense("capacity", "bounds exactly one of chunks, tokens, bytes")


@dataclass(frozen=True, slots=True)
class Policy:
    """The rule by which chunks go when a bank is full.

    kind: "frequency" (by retrieval count), "lru" (least recently retrieved; a chunk never retrieved counts from its
        writing), "recency_half" (the oldest half) or "reject" (a full bank refuses).
    lower, upper: percent of the live chunks, oldest first; below lower goes first, from upper on is protected. Only
        "frequency" has them.
    target: percent of the capacity to which an eviction reduces the bank; "frequency" and "lru" have it.
    """

    kind: str = "frequency"
    lower: int = 10
    upper: int = 90
    target: int = 50


@dataclass(frozen=True, slots=True)
class Quota:
    """Hard bounds of a bank; a write that would pass one raises QuotaExceeded, after what the capacity evicts.

    None leaves out a bound.
    """

    chunks: int | None = None
    tokens: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in Quota.__slots__}
        bounds = [integer(name, bound) for name, bound in given.items() if bound is not None]
        if not bounds or min(bounds) < 1:
            raise _nonsense("quota", "bounds at least one of chunks, tokens, bytes, each by 1 or more")


@dataclass(frozen=True, slots=True)
class Expiry:
    """When a chunk goes by itself: `ttl` after its writing; `Expiry(None)` is never.

    renew: every counted retrieval starts the ttl anew.
    """

    ttl: timedelta | None
    renew: bool = False

    def __post_init__(self) -> None:
        renew = flag("renew", self.renew)
        if self.ttl is None and renew:
            raise _nonsense("expiry", "has no ttl to renew")
        if self.ttl is not None and instance("ttl", self.ttl, timedelta) <= timedelta(0):
            raise _nonsense("expiry", "needs a ttl longer than nothing; Expiry(None) is never")


@dataclass(frozen=True, slots=True)
class BankUsage:
    """Figures of a bank at the time of the answer; the last five count since it was created."""

    chunks: int
    tokens: int
    bytes: int
    chunks_written: int
    chunks_evicted: int
    chunks_deleted: int
    chunks_quarantined: int
    chunks_expired: int


@dataclass(frozen=True, slots=True)
class Bank:
    """A bank, which is a named memory. `uid` is random and never reused; `kv` is None in a bank of vectors only.

    expiry: of chunks that state none; None is never.
    index: "exact", "ivf" (approximate, trained from the bank itself), or "auto", which goes by size.
    """

    name: str
    uid: str
    kv: KVSpec | None
    embedding: EmbeddingSpec
    capacity: Capacity | None
    policy: Policy
    metadata: Mapping[str, Scalar]
    create_time: datetime
    usage: BankUsage
    quota: Quota | None
    expiry: Expiry | None
    index: str


@dataclass(frozen=True, slots=True)
class Producer:
    """The maker of a payload.

    method: compressor with parameters, such as "none" or "tova:m=64".
    context: "isolated" (the chunk was encoded alone) or "window" (with its local context).
    adapter_digest: of an encoder adapter; empty when the reader itself made the payload.
    measured_loss: restoration loss, nats per token; with the method "none", of the compression that was refused.
    """

    method: str
    version: str = ""
    context: str = ""
    adapter_digest: str = ""
    measured_loss: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class NewChunk:
    """A chunk that is to be written.

    embedding: float32 [dimension], of numpy or torch, or a list of numbers.
    tensors: of numpy or torch, in the bank's dtype, either K-V: `k.<layer>`, `v.<layer>` [Hkv, m, D], keys before RoPE,
        and `pos.<layer>` int32 [m] or [Hkv, m], the original offset of each kept token; or soft tokens: `soft`
        [n, hidden_size] and nothing else. None in a bank of vectors only.
    start: offset of the first token in its source.
    original_length: tokens before compression; by default the number of token ids, else the tokens stored.
    pinned: never evicted by a policy; it still expires, and can be deleted.
    expiry: None is the bank's, `Expiry(None)` never.
    idempotency_key: 16 bytes, made once here, so that this object may be written any number of times and is stored
        once.
    if_absent: write only where no chunk of this key is in the bank. One that is there is answered as replayed, whatever
        its content; one that has gone does not count, where a write without `if_absent` is answered as gone for a day.
        For keys that follow from the content. (A server before 0.2 does not know it: it refuses other content, and
        answers as gone.)
    """

    embedding: npt.ArrayLike
    tensors: Mapping[str, Any] | None = None
    start: int = field(default=0, kw_only=True)
    original_length: int | None = field(default=None, kw_only=True)
    token_ids: Sequence[int] | Array = field(default=(), kw_only=True)
    text: str = field(default="", kw_only=True)
    metadata: Mapping[str, Scalar] = field(default_factory=dict, kw_only=True)
    producer: Producer | None = field(default=None, kw_only=True)
    pinned: bool = field(default=False, kw_only=True)
    expiry: Expiry | None = field(default=None, kw_only=True)
    idempotency_key: bytes = field(default_factory=lambda: uuid.uuid4().bytes, kw_only=True)
    if_absent: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.tensors is not None:
            mapping("tensors", self.tensors)
        object.__setattr__(self, "metadata", checked_metadata(self.metadata))
        object.__setattr__(self, "if_absent", flag("if_absent", self.if_absent))

    @property
    def kind(self) -> PayloadKind | None:
        """Return what the tensors are; None for a chunk without tensors."""
        return None if not self.tensors else "soft_tokens" if "soft" in self.tensors else "layer_kv"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The description of one tensor of a stored payload, without its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A chunk as the service has stored it.

    kind: "layer_kv" or "soft_tokens"; None in a bank of vectors only.
    layout: its tensors, without bytes; empty in a bank of vectors only.
    checksum: names the payload's content; for `Held`.
    tensors: the bytes, verified, as arrays of numpy (bf16 is `ml_dtypes.bfloat16`) or tensors of torch; None where they
        were not asked for or are held.
    embedding: float32 [dimension]; None where it was not asked for.
    last_retrieve_time: None when never retrieved.
    expiry, expire_time: what holds for this chunk; None is never.
    """

    chunk_id: int
    bank: str
    idempotency_key: bytes
    start: int
    original_length: int
    stored_length: int
    token_ids: tuple[int, ...]
    text: str
    metadata: Mapping[str, Scalar]
    producer: Producer | None
    kind: str | None
    layout: tuple[TensorInfo, ...]
    checksum: int
    tensors: dict[str, Any] | None
    embedding: npt.NDArray[np.float32] | None
    create_time: datetime
    retrieval_count: int
    last_retrieve_time: datetime | None
    pinned: bool
    expiry: Expiry | None
    expire_time: datetime | None


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers that are within every bound that is stated, for a `Filter`.

    Whole numbers and others are compared as the numbers that they are; strings and bools are in no range.

        Range(at_least=2000, below=2010)
    """

    at_least: float | None = None
    below: float | None = None
    above: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in Range.__slots__}
        bounds = {name: finite(name, bound) for name, bound in given.items() if bound is not None}
        if not bounds:
            raise _nonsense("range", "has at least one bound")
        for name, bound in bounds.items():
            object.__setattr__(self, name, bound)


# The most filters that a filter may have as alternatives.
MOST_ALTERNATIVES = 100
# The most stretches that a filter may have.
MOST_STRETCHES = 10_000
# What a filter wants of one key.
Wanted = Scalar | Collection[Scalar] | Range | EllipsisType


@dataclass(frozen=True, slots=True)
class Stretch:
    """Chunks of a session in its bank: those whose metadata "branch" is `branch`, and that begin before `start_before`;
    None for the last stretch, which has no end yet."""

    branch: str
    start_before: int | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions that every chunk of a search or a list meets, all that are stated. They select before the top k.

    metadata: key to what its value must be: a value, a collection of values (any of them), a `Range` of numbers, or
        `...` (any value). Numbers are equal where they are the same number (2 and 2.0); a bool is equal to no number.
    exclude: in the same form, what must not hold; a chunk without the key passes.
    created_from, created_before, start_from, start_before: half open ranges of `Chunk.create_time` and `Chunk.start`.
    pinned: only pinned chunks, or only others.
    any_of: at most 100 filters, of which at least one must hold besides; they have no alternatives themselves. Empty is
        no such condition.
    stretches: of sessions, at most 10,000; the chunk is of one of them. `Session.filter` has those of a session. Empty
        is no such condition.

        Filter(metadata={"speaker": "ann", "room": ["a", "b"]}, exclude={"draft": ...}, start_from=1000)
        Filter(metadata={"year": Range(at_least=2000), "final": True})
    """

    metadata: Mapping[str, Wanted] = field(default_factory=dict)
    exclude: Mapping[str, Wanted] = field(default_factory=dict)
    created_from: datetime | None = None
    created_before: datetime | None = None
    start_from: int | None = None
    start_before: int | None = None
    pinned: bool | None = None
    any_of: Sequence["Filter"] = ()
    stretches: Sequence[Stretch] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "any_of", tuple(each("any_of", self.any_of, _alternative)))
        if len(self.any_of) > MOST_ALTERNATIVES:
            raise invalid("any_of", f"expected at most {MOST_ALTERNATIVES} filters, got {len(self.any_of)}")
        object.__setattr__(self, "stretches", tuple(each("stretches", self.stretches, _stretch)))
        if len(self.stretches) > MOST_STRETCHES:
            raise invalid("stretches", f"expected at most {MOST_STRETCHES}, got {len(self.stretches)}")
        for name, conditions in (("metadata", self.metadata), ("exclude", self.exclude)):
            for key, wanted in mapping(name, conditions).items():
                if not isinstance(wanted, Range | EllipsisType):
                    for value in alternatives(wanted, f"{name}[{shown(key)}]"):
                        scalar(f"{name}[{shown(key)}]", value)
        for name in ("created_from", "created_before"):
            time = getattr(self, name)
            if time is not None and instance(name, time, datetime).utcoffset() is None:
                raise _nonsense("filter", "needs times with a time zone, such as datetime.now(UTC)")
        for name in ("start_from", "start_before"):
            if (place := getattr(self, name)) is not None:
                integer(name, place)
        if _is_empty(self.created_from, self.created_before) or _is_empty(self.start_from, self.start_before):
            raise _nonsense("filter", "has a range that ends before it begins")


def _alternative(field: str, value: object) -> Filter:
    if instance(field, value, Filter).any_of:
        raise invalid(field, "expected filters that have no any_of themselves")
    return value  # type: ignore[return-value]


def _stretch(field: str, value: object) -> Stretch:
    return instance(field, value, Stretch)


def alternatives(wanted: Any, field: str = "metadata") -> list[Any]:
    """Return the values that a condition of a filter lets pass, one or several. Errors: InvalidArgument for none."""
    several = isinstance(wanted, Collection) and not isinstance(wanted, str | bytes | bytearray | Mapping)
    if not several or (is_array(wanted) and not wanted.ndim):
        return [wanted]
    if not (found := items(field, wanted)):
        raise invalid(field, "expected a value, some values, a Range or ..., got an empty list")
    return found


def _is_empty(first: Any, before: Any) -> bool:
    return first is not None and before is not None and bool(before <= first)


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The acknowledgement of a chunk, which is durable from here on.

    replayed: the key had been acknowledged before; nothing was written now.
    gone: the chunk of a replayed key has been evicted or deleted since, or has expired.
    evicted: ids of the chunks that this write evicted.
    """

    chunk_id: int
    replayed: bool
    gone: bool
    evicted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """Payloads that the caller has: chunk id to `Chunk.checksum`, for one store."""

    store_id: str
    checksums: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk found for a query; a higher score is nearer."""

    chunk_id: int
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class Retrieval:
    """The answer to a search.

    queries: hits of each query in the order asked, score descending, ties by lower id.
    chunks: every chunk that was hit, once, ascending by id.
    store_id: for `Held`.
    """

    store_id: str
    queries: list[list[Hit]]
    chunks: dict[int, Chunk]


@dataclass(frozen=True, slots=True)
class Eviction:
    """A chunk that would go (`evict_time` is None) or went.

    reason: "oldest", "least_retrieved", "least_recent", "oldest_half" or "room".
    """

    chunk_id: int
    reason: str
    retrieval_count: int
    start: int
    stored_length: int
    create_time: datetime
    evict_time: datetime | None
    metadata: Mapping[str, Scalar]


class EvictionPlan(list[Eviction]):
    """The chunks that would go, in order.

    explanation: a sentence with the figures, also where no chunk can go; empty where none has to.
    """

    def __init__(self, victims: Iterable[Eviction] = (), explanation: str = "") -> None:
        super().__init__(items("victims", victims))
        self.explanation = explanation


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server and its limits. `store_id` identifies the data folder, `durability` is "fsync" or "os"."""

    version: str
    store_id: str
    durability: str
    max_message_bytes: int
    max_chunk_bytes: int
    max_unacknowledged_bytes: int


@dataclass(frozen=True, slots=True)
class IndexStats:
    """The search index of a bank.

    kind: what serves now, "exact" or "ivf"; a bank too small for IVF is served exactly.
    loaded: False for a bank at rest, whose index comes back with the next search.
    tombstones: vectors removed and not yet compacted away.
    recall: of IVF, the share of the exact top 10 that it finds, measured when it was trained; None for exact.
    """

    kind: str
    loaded: bool
    vectors: int
    tombstones: int
    memory_bytes: int
    recall: float | None


@dataclass(frozen=True, slots=True)
class BankStats:
    """A bank and the state of its index. tenant: whose bank it is; "" where the server knows no tenants. Of another
    tenant's bank an operator sees the figures, and no metadata."""

    bank: Bank
    index: IndexStats
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class MetricSample:
    """One figure, as `/metrics` gives it to Prometheus (docs/operations.md)."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Stats:
    """The state of the service at one moment, and what it has done since `start_time`.

    free_bytes: of the disk that holds its data. database_bytes, database_free_bytes: the size of its database, and what
    is free in that (see `compact`). index_bytes: the size of its snapshots of indexes. tenants: that of the caller,
    with what it holds and may hold. An operator sees the banks of all tenants, and all tenants; for other callers the
    figures of the whole service (memory, disk, samples) are 0 or empty.
    """

    version: str
    store_id: str
    start_time: datetime
    resident_bytes: int
    free_bytes: int
    banks: tuple[BankStats, ...]
    samples: tuple[MetricSample, ...]
    database_bytes: int = 0
    database_free_bytes: int = 0
    index_bytes: int = 0
    uptime: timedelta = timedelta()
    tenants: tuple[Tenant, ...] = ()


@dataclass(frozen=True, slots=True)
class Compacted:
    """Bytes of the service's database with its log, before it was compacted and after."""

    database_bytes_before: int
    database_bytes: int


def _nonsense(what: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"a {what} {why}", reason="INVALID_FIELD", metadata={"field": what})
