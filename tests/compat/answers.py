"""What a store and a session answer, as values of JSON in which every bit counts. It is asked with words that the
released version and this one have in common.
"""

import hashlib
from datetime import datetime, timedelta
from typing import Any

import numpy as np

import kvbank

READER, EMBEDDER, DIMENSION = "reader", "embedder", 8
KV = kvbank.KVSpec(READER, layers=(0, 2), kv_heads=2, head_dim=4, hidden_size=6)
EMBEDDING = kvbank.EmbeddingSpec(EMBEDDER, DIMENSION)
DIGESTS = {"reader_digest": READER, "embedder_digest": EMBEDDER}
BANK_FIELDS = (
    "name",
    "uid",
    "metadata",
    "create_time",
    "index",
    "kv",
    "embedding",
    "capacity",
    "policy",
    "quota",
    "expiry",
)
USAGE_FIELDS = ("chunks", "tokens", "chunks_written", "chunks_evicted", "chunks_deleted", "chunks_expired")
CHUNK_FIELDS = (
    *(
        "chunk_id",
        "bank",
        "idempotency_key",
        "start",
        "original_length",
        "stored_length",
        "token_ids",
        "text",
        "metadata",
    ),
    *("producer", "kind", "layout", "checksum", "embedding", "create_time", "retrieval_count", "last_retrieve_time"),
    *("pinned", "expiry", "expire_time"),
)
EVICTION_FIELDS = (
    "chunk_id",
    "reason",
    "retrieval_count",
    "start",
    "stored_length",
    "create_time",
    "evict_time",
    "metadata",
)


def of_store(client: kvbank.Client) -> dict[str, Any]:
    """Ask for everything that a store can say, and count no retrieval."""
    banks = {bank.name: bank for bank in client.list_banks()}
    return {
        "banks": {name: told(bank, BANK_FIELDS) | told(bank.usage, USAGE_FIELDS) for name, bank in banks.items()},
        "chunks": {name: [told(chunk, CHUNK_FIELDS) for chunk in client.list_chunks(name, True)] for name in banks},
        "tensors": {name: tensors(client, bank) for name, bank in banks.items() if bank.kv},
        "hits": {name: hits(client, bank) for name, bank in banks.items()},
        "evictions": {name: [told(each, EVICTION_FIELDS) for each in client.list_evictions(name)] for name in banks},
        "next to go": {name: [each.chunk_id for each in client.explain_eviction(name)] for name in banks},
    }


def tensors(client: kvbank.Client, bank: kvbank.Bank) -> dict[str, Any]:
    """Fetch the tensors of all chunks of a bank."""
    assert bank.kv is not None
    ids = [chunk.chunk_id for chunk in client.list_chunks(bank.name)]
    found = client.fetch(bank.name, ids, reader_digest=bank.kv.reader_digest)
    return {str(c.chunk_id): {name: plain(array) for name, array in (c.tensors or {}).items()} for c in found}


def hits(client: kvbank.Client, bank: kvbank.Bank) -> list[Any]:
    """Search with some queries, with and without a filter."""
    queries = np.random.default_rng(7).standard_normal((5, bank.embedding.dimension)).astype(np.float32)
    found = []
    for some in (None, kvbank.Filter(metadata={"half": "even"}, start_from=2)):
        answer = client.retrieve(
            bank.name,
            queries,
            top_k=9,
            filter=some,
            payload=False,
            count=False,
            embedder_digest=bank.embedding.embedder_digest,
        )
        found.append([[[hit.chunk_id, hit.score.hex()] for hit in one] for one in answer.queries])
    return found


def vector(seed: int) -> np.ndarray:
    """Make an embedding for a chunk of these banks."""
    return np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)


def told(value: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    return {name: plain(getattr(value, name)) for name in fields}


def plain(value: Any) -> Any:
    """Write a value as JSON has it; arrays by their type, shape and a hash of their bytes."""
    if isinstance(value, np.ndarray):
        return [value.dtype.name, list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime | timedelta):
        return str(value)
    if hasattr(type(value), "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in type(value).__dataclass_fields__}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return {key: plain(each) for key, each in value.items()} if hasattr(value, "items") else value
