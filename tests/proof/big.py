"""Chunks with payloads of some MiB, for what is about bytes."""

import secrets
from dataclasses import replace

import numpy as np

import kvbank
from tests.proof.content import DIMENSION, EMBEDDER, READER
from tests.support.chunks import tensors_of

MIB = 1 << 20
DIGESTS = {"reader_digest": READER, "embedder_digest": EMBEDDER}
KV = kvbank.KVSpec(READER, layers=(0,), kv_heads=4, head_dim=128)
EMBEDDING = kvbank.EmbeddingSpec(EMBEDDER, DIMENSION)


class BigChunks:
    """New chunks of about `size` bytes each; the K-V are those of a first one, the embedding and the key are new."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        tokens = max(1, size // (2 * 2 * KV.kv_heads * KV.head_dim))
        tensors = tensors_of(KV, tokens, self._random)
        self._first = kvbank.NewChunk(np.zeros(DIMENSION, np.float32), tensors)
        self.payload = sum(array.nbytes for array in tensors.values())

    def new(self) -> kvbank.NewChunk:
        vector = self._random.standard_normal(DIMENSION).astype(np.float32)
        return replace(self._first, embedding=vector, idempotency_key=secrets.token_bytes(16))

    def same(self, found: kvbank.Chunk) -> bool:
        """Tell whether the tensors of a stored chunk are those that were written."""
        expected = self._first.tensors or {}
        tensors = found.tensors or {}
        return all(tensors[name].tobytes() == array.tobytes() for name, array in expected.items())
