"""Chunks that follow from their key alone, so that for any chunk in a store it is known what the chunk must be."""

import secrets
from collections.abc import Iterator

import numpy as np

import kvbank
from kvbank.v1 import chunk_pb2, service_pb2
from tests.support import chunks
from tests.support.chunks import described, tensors_of

READER, EMBEDDER, DIMENSION = "reader-of-the-proof", "embedder-of-the-proof", 16
KV = kvbank.KVSpec(READER, layers=(1, 3), kv_heads=2, head_dim=8)
EMBEDDING = kvbank.EmbeddingSpec(EMBEDDER, DIMENSION)
DIGESTS = {"reader_digest": READER, "embedder_digest": EMBEDDER}


def new_key(tokens: int | None = None) -> bytes:
    """Make a key for `tokens` tokens (1 to 256), or for any number of them."""
    return secrets.token_bytes(16) if tokens is None else bytes([tokens - 1]) + secrets.token_bytes(15)


def tokens_of(key: bytes) -> int:
    return key[0] + 1


def chunk_of(key: bytes) -> kvbank.NewChunk:
    """Make the chunk of a key, with 136 bytes of K-V a token."""
    random, m = np.random.default_rng(int.from_bytes(key, "big")), tokens_of(key)
    tensors = tensors_of(KV, m, random)
    return kvbank.NewChunk(
        vector_of(key),
        tensors,
        start=int(random.integers(10**6)),
        original_length=m + 2,
        text=key.hex(),
        metadata={"half": key.hex()[:1]},
        idempotency_key=key,
    )


def vector_of(key: bytes) -> np.ndarray:
    vector = np.random.default_rng(int.from_bytes(key, "little")).standard_normal(DIMENSION).astype(np.float32)
    return vector / np.linalg.norm(vector)


def differences(found: kvbank.Chunk) -> list[str]:
    """Say where a chunk that a store gave, with its tensors, differs from that of its key."""
    expected = chunk_of(found.idempotency_key)
    wrong = [name for name in ("start", "text", "metadata") if getattr(found, name) != getattr(expected, name)]
    tensors, found_tensors = expected.tensors or {}, found.tensors or {}
    if found_tensors.keys() != tensors.keys():
        return [*wrong, "tensors"]
    return wrong + [name for name, array in tensors.items() if found_tensors[name].tobytes() != array.tobytes()]


def frames_of(bank: str, chunk: kvbank.NewChunk, step: int = 1 << 20) -> Iterator[service_pb2.WriteChunksRequest]:
    """Yield what a write of the chunk sends: a header, then frames of `step` bytes. The SDK's repetitions are left
    out."""
    tensors, data = described(chunk.tensors or {})
    message = chunk_pb2.Chunk(
        idempotency_key=chunk.idempotency_key,
        start=chunk.start,
        original_length=chunk.original_length,
        stored_length=tokens_of(chunk.idempotency_key),
        text=chunk.text,
        metadata=chunk.metadata,
        embedding=np.asarray(chunk.embedding).tobytes(),
        payload=chunk_pb2.PayloadDescriptor(kind=chunk_pb2.PAYLOAD_KIND_LAYER_KV, tensors=tensors),
    )
    return chunks.frames_of(message, data, bank, reader=READER, embedder=EMBEDDER, step=step)
