"""Chunks of soft tokens, and the spec of a bank that takes them."""

import numpy as np

from kvbank.v1 import bank_pb2, chunk_pb2
from tests.support.caller import BF16, READER
from tests.support.chunks import DTYPES, described

HIDDEN = 6
SPEC = {"reader_digest": READER, "layers": (1, 3), "kv_heads": 2, "head_dim": 8}


def spec(hidden_size: int = HIDDEN) -> bank_pb2.KvSpec:
    """Return the K-V spec of a bank that takes soft tokens."""
    return bank_pb2.KvSpec(**SPEC, dtype=BF16, hidden_size=hidden_size)


def soft_chunk(caller, n=2, *, hidden=HIDDEN, vector=(1, 0, 0, 0), seed=0, **fields):
    """Make a chunk of `n` soft tokens, for the methods of `Caller`."""
    chunk, _ = caller.chunk(vector, layers=[], stored_length=n)
    soft = np.frombuffer(np.random.default_rng(seed).bytes(2 * n * hidden), DTYPES["bf16"]).reshape(n, hidden)
    tensors, data = described({"soft": soft})
    chunk.payload.kind = chunk_pb2.PAYLOAD_KIND_SOFT_TOKENS
    chunk.payload.tensors.extend(tensors)
    chunk.payload.producer.CopyFrom(
        chunk_pb2.Producer(method="icae:adapter=a", version="1", adapter_digest="ad", measured_loss=0.25)
    )
    for name, value in fields.items():
        setattr(chunk, name, value)
    return chunk, data
