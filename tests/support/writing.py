"""Chunks with K-V on the way of a write (`operations.writing`), over an engine without a server."""

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import xxhash

from memory_service.domain.limits import NO_PAUSES, Pauses
from memory_service.domain.model import Bank, Chunk, EmbeddingSpec, KvSpec, Payload, Policy, Producer, Tensor
from memory_service.observe.metrics import Metrics
from memory_service.operations.writing import Admitted, Writes
from memory_service.storage.base import Engine, Written
from tests.support.store import DIMENSION

DATA = bytes(range(32)) + (0).to_bytes(4, "little") + (1).to_bytes(4, "little")
KV = KvSpec("reader", (0,), 1, 4, "fp16")


def tensor(name: str, dtype: Any, shape: tuple[int, ...], begin: int, length: int) -> Tensor:
    """Describe a part of DATA as a caller does."""
    return Tensor(name, dtype, shape, 0, length, xxhash.xxh3_64_intdigest(DATA[begin : begin + length]))


PAYLOAD = Payload(
    (
        tensor("k.0", "fp16", (1, 2, 4), 0, 16),
        tensor("v.0", "fp16", (1, 2, 4), 16, 16),
        tensor("pos.0", "int32", (2,), 32, 8),
    ),
    Producer(),
)


def made_bank(engine: Engine, **fields: Any) -> Bank:
    """Make the bank b, which holds K-V."""
    bank = Bank("b", KV, EmbeddingSpec("embedder", DIMENSION), None, Policy(), {})
    return engine.store.create_bank(replace(bank, **fields))[0]


def admitted(writes: Writes, bank: Bank, chunk: Chunk) -> Admitted:
    """Have a chunk for a bank checked, and give it its id."""
    found = writes.admit(bank, "reader", "embedder", chunk)
    for waited in found.waits():
        waited.result(60)
    return found


def begun(writes: Writes, chunk: Admitted, data: bytes = DATA) -> "Future[Written]":
    """Begin to write an admitted chunk."""
    return writes.begin([(chunk, data)])[0]


def writer(engine: Engine, pauses: Pauses = NO_PAUSES) -> Writes:
    """Make the way of chunks into the banks of an engine."""
    return Writes(engine, Metrics(), 1 << 20, pauses)
