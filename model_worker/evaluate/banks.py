"""Banks of a measurement: each is made for one text, filled, and deleted when the text was measured."""

from collections.abc import Callable, Iterable, Sequence
from typing import Unpack

import kvbank
from model_worker.evaluate.stream import feed, window_of
from model_worker.model import MemoryModel
from model_worker.remember.filling import Filling
from model_worker.remember.memory import Memory
from model_worker.remember.settings import MemoryOptions


def open_memory(
    model: MemoryModel,
    bank: str,
    *,
    capacity: kvbank.Capacity | None = None,
    policy: kvbank.Policy | None = None,
    **changes: Unpack[MemoryOptions],
) -> Memory:
    """Open a memory over another bank, which is made with these bounds and the K-V dtype of the model's settings.

    changes: fields of `MemorySettings` in which it differs from the model's own memory.
    """
    memory = Memory(model.attachment, model.client, bank, model.tokenizer, model.settings, **changes)
    memory.open(capacity=capacity, policy=policy, dtype=model.settings.store_dtype)
    return memory


def fill(model: MemoryModel, memory: Memory, ids: Sequence[int], tell: Callable[[int], None] | None = None) -> None:
    """Feed a text as a stream in the local window, and write all that leaves it, without recalling."""
    cache = window_of(model, Filling(memory))
    feed(model, ids, cache, tell=tell)
    cache.flush()


def forget(client: kvbank.Client, banks: Iterable[str]) -> int:
    """Delete those of the banks that are there, and return the bytes of payloads and embeddings that they took."""
    wanted, stored = set(banks), 0
    for bank in list(client.list_banks()):
        if bank.name in wanted:
            stored += bank.usage.bytes
            client.delete_bank(bank.name)
    return stored
