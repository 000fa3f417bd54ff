"""What goes into and comes out of a client. Plain frozen values; nothing here does I/O.

Sizes are in bytes, lengths in tokens, times are aware datetimes in UTC.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbank._exceptions import InvalidArgument

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Which keys and values a bank holds.

    reader_digest: of the model that will attend to them; every write and read states it.
    layers: memory layers, counted from 0, ascending.
    dtype: "bf16", "fp16" or "fp32".
    reader_parts: what the digest was made of, so that a refusal can say what differs.
    """

    reader_digest: str
    layers: Sequence[int]
    kv_heads: int
    head_dim: int
    dtype: str = "bf16"
    reader_parts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """Which embeddings a bank is searched by."""

    embedder_digest: str
    dimension: int
    metric: str = "inner_product"


@dataclass(frozen=True, slots=True)
class Capacity:
    """A bound on one of: chunks, stored tokens, payload bytes."""

    chunks: int | None = None
    tokens: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if sum(limit is not None for limit in (self.chunks, self.tokens, self.bytes)) != 1:
            raise InvalidArgument("a capacity bounds exactly one of chunks, tokens, bytes", reason="INVALID_FIELD")


@dataclass(frozen=True, slots=True)
class Policy:
    """What goes when a bank is full.

    kind: "frequency" (by retrieval count), "recency_half" or "reject" (a full bank refuses).
    lower, upper: percent of the live chunks, oldest first; below lower goes first, from upper on is protected.
    target: percent of the capacity to which an eviction reduces the bank.
    The last three belong to "frequency".
    """

    kind: str = "frequency"
    lower: int = 10
    upper: int = 90
    target: int = 50


@dataclass(frozen=True, slots=True)
class BankUsage:
    """Figures of a bank at the time of the answer; the last four count since it was created."""

    chunks: int
    tokens: int
    bytes: int
    chunks_written: int
    chunks_evicted: int
    chunks_deleted: int
    chunks_quarantined: int


@dataclass(frozen=True, slots=True)
class Bank:
    """A named memory. `uid` is random and never reused; `kv` is None when it holds vectors only."""

    name: str
    uid: str
    kv: KVSpec | None
    embedding: EmbeddingSpec
    capacity: Capacity | None
    policy: Policy
    metadata: Mapping[str, str]
    create_time: datetime
    usage: BankUsage


@dataclass(frozen=True, slots=True)
class Producer:
    """What made a payload.

    method: compressor with parameters, such as "none" or "tova:m=64".
    context: "isolated" (the chunk was encoded alone) or "window" (with its local context).
    adapter_digest: of an encoder adapter; empty when the reader itself made the payload.
    measured_loss: restoration loss, nats per token.
    """

    method: str
    version: str = ""
    context: str = ""
    adapter_digest: str = ""
    measured_loss: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class NewChunk:
    """A chunk to write.

    embedding: float32 [dimension].
    tensors: `k.<layer>`, `v.<layer>` [Hkv, m, D] in the bank's dtype, keys before RoPE, and `pos.<layer>` int32 [m] or
        [Hkv, m], the original offset of each kept token; None in a bank of vectors only.
    start: offset of the first token in its source.
    original_length: tokens before compression; by default the number of token ids, else the tokens stored.
    idempotency_key: 16 bytes, made once here, so that this object may be written any number of times and is stored
        once.
    """

    embedding: npt.ArrayLike
    tensors: Mapping[str, Array] | None = None
    start: int = field(default=0, kw_only=True)
    original_length: int | None = field(default=None, kw_only=True)
    token_ids: Sequence[int] | Array = field(default=(), kw_only=True)
    text: str = field(default="", kw_only=True)
    metadata: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    producer: Producer | None = field(default=None, kw_only=True)
    idempotency_key: bytes = field(default_factory=lambda: uuid.uuid4().bytes, kw_only=True)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a stored payload."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A stored chunk.

    layout: its tensors, without bytes; empty in a bank of vectors only.
    checksum: names the payload's content; for `Held`.
    tensors: the bytes, verified; None where they were not asked for or are held. bf16 is `ml_dtypes.bfloat16`.
    embedding: float32 [dimension]; None where it was not asked for.
    last_retrieve_time: None when never retrieved.
    """

    chunk_id: int
    bank: str
    idempotency_key: bytes
    start: int
    original_length: int
    stored_length: int
    token_ids: tuple[int, ...]
    text: str
    metadata: Mapping[str, str]
    producer: Producer | None
    layout: tuple[TensorInfo, ...]
    checksum: int
    tensors: dict[str, Array] | None
    embedding: npt.NDArray[np.float32] | None
    create_time: datetime
    retrieval_count: int
    last_retrieve_time: datetime | None


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The acknowledgement of a chunk, which is durable from here on.

    replayed: the key had been acknowledged before; nothing was written now.
    gone: the chunk of a replayed key has been evicted or deleted since.
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

    reason: "oldest", "least_retrieved", "oldest_half" or "room".
    """

    chunk_id: int
    reason: str
    retrieval_count: int
    start: int
    stored_length: int
    create_time: datetime
    evict_time: datetime | None
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server and its limits. `store_id` identifies the data folder, `durability` is "fsync" or "os"."""

    version: str
    store_id: str
    durability: str
    max_message_bytes: int
    max_chunk_bytes: int
    max_unacknowledged_bytes: int
