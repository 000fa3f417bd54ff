"""Banks and chunks as a store knows them, and short words for its steps."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memory_service.domain import digest
from memory_service.domain.errors import ServiceError
from memory_service.domain.model import (
    Bank,
    Chunk,
    EmbeddingSpec,
    Filter,
    KvSpec,
    Policy,
)
from memory_service.storage.base import New, Store, View, Written

DIMENSION, CHUNK_BYTES = 4, 1000
ALL = Filter()


def new_bank(name: str = "b", **fields: Any) -> Bank:
    """Make a bank of vectors alone."""
    given: dict[str, Any] = {"capacity": None, "policy": Policy(), "metadata": {}} | fields
    return Bank(name, KvSpec("", (), 0, 0, None), EmbeddingSpec("embedder", DIMENSION), **given)


def new_chunk(number: int, **fields: Any) -> Chunk:
    """Make the chunk of a number, which is its key, its start and the seed of its embedding; it is of one of three
    branches."""
    vector = np.random.default_rng(number).standard_normal(DIMENSION).astype("<f4")
    chunk = Chunk(
        key=number.to_bytes(16, "big"),
        start=number,
        original_length=2,
        stored_length=2,
        token_ids=np.arange(2, dtype="<i4").tobytes(),
        text=f"chunk {number}",
        metadata={"number": number, "half": "odd" if number % 2 else "even", "branch": f"b{number % 3}"},
        embedding=vector.tobytes(),
        payload=None,
        stored_bytes=CHUNK_BYTES,
    )
    return replace(chunk, **fields)


def id_from(store: Store) -> int:
    while isinstance(chunk_id := store.new_id(), Future):
        chunk_id.result(60)
    return chunk_id


def new(store: Store, bank: Bank, chunk: Chunk) -> New:
    """Make of a chunk what the write path adds."""
    made = digest.of_request(chunk)
    expiry = bank.expiry if chunk.expiry is None else chunk.expiry
    chunk = replace(chunk, chunk_id=id_from(store), bank=bank.name, created=store.clock.now_us(), expiry=expiry)
    return New(bank, chunk, made)


def adding(store: Store, bank: Bank, chunk: Chunk) -> "Future[Written]":
    """Add a chunk as the write path does."""
    return store.add([new(store, bank, chunk)])[0]


def add(store: Store, bank: Bank, number: int, **fields: Any) -> Written:
    return adding(store, bank, new_chunk(number, **fields)).result(60)


def fill(store: Store, bank: Bank, numbers: Sequence[int]) -> list[int]:
    return [done.result(60).chunk_id for done in [adding(store, bank, new_chunk(number)) for number in numbers]]


def reason(action: Callable[[], Any]) -> str:
    """Return the reason for which an action is refused."""
    with pytest.raises(ServiceError) as caught:
        action()
    return caught.value.reason


def bank_now(store: Store, bank: Bank) -> Bank:
    with store.read() as view:
        found = view.bank(bank.bank_id)
    assert found is not None
    return found


def ids_in(view: View, bank: Bank, where: Filter = ALL) -> list[int]:
    return [chunk.chunk_id for chunk in view.page(bank, 0, where, embedding=False)]


def held(store: Store, bank: Bank, where: Filter = ALL) -> list[int]:
    with store.read() as view:
        return ids_in(view, bank, where)
