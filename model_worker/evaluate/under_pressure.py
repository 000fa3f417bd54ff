"""Facts in a bank that has no room for the text: those that are asked for should stay, and the others may go.

The chunks of a bank are written again, in their order, to one that is bounded and evicts those that were recalled least
(policy `frequency`, docs/eviction.md). Every second fact is searched for all along, as soon as its chunk is there. The
chunks are copied rather than computed again, so that both banks hold the same.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvbank
from model_worker.embed import embedded_queries
from model_worker.evaluate.asking import MEMORY, Asker
from model_worker.evaluate.banks import forget, open_memory
from model_worker.evaluate.interval import Share
from model_worker.evaluate.planting import Planted, PlantedText
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory

# Bounds 10/90 would drop the oldest tenth however often it was asked for; see docs/eviction.md.
POLICY = kvbank.Policy("frequency", lower=0, upper=90, target=50)
_BANK = "facts-under-pressure"
_BATCH = 16  # chunks that are copied at once
_ROUNDS = 8  # searches for each asked fact while the bank's capacity is written, at least


def measure_pressure(
    model: MemoryModel,
    planted: PlantedText,
    bank: str,
    capacity: kvbank.Capacity,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Copy a bank to one of `capacity`, in tokens, and return what is left of the facts, asked for or not."""
    memory = open_memory(model, _BANK, capacity=capacity, policy=POLICY, count=False)
    asked, never = planted.facts[::2], planted.facts[1::2]
    vectors = embedded_queries(memory.embedder, [own.fact.beginning for own in asked])
    at_once = max(1, min(_BATCH, (capacity.tokens or 0) // _ROUNDS // model.chunk))
    total, copied = model.client.get_bank(bank).usage.chunks, 0
    for batch in _batches(model, bank, at_once):
        model.client.write_many(
            _BANK,
            batch,
            reader_digest=model.attachment.reader.digest,
            embedder_digest=memory.embedder.digest,
        )
        written = batch[-1].start + (batch[-1].original_length or 0)
        _search(memory, vectors[[own.answer < written for own in asked]])
        copied += len(batch)
        progress(copied, total)
    usage = model.client.get_bank(_BANK).usage
    asker = Asker(model, memory, [], len(planted.ids))
    groups = {"asked for": asked, "never asked for": never}
    rows = [_group(model, asker, name, facts) for name, facts in groups.items() if facts]
    found = {"capacity": capacity.tokens, "written": usage.chunks_written, "evicted": usage.chunks_evicted}
    forget(model.client, [_BANK])
    return {**found, "policy": f"{POLICY.kind} {POLICY.lower}/{POLICY.upper}/{POLICY.target}", "facts": rows}


def _batches(model: MemoryModel, bank: str, at_once: int) -> Iterator[list[kvbank.NewChunk]]:
    """Yield the chunks of a bank in their order, so many at once, as they are written to another."""
    listed = iter(model.client.list_chunks(bank, with_embedding=True))
    while batch := list(islice(listed, at_once)):
        ids = [chunk.chunk_id for chunk in batch]
        fetched = model.client.fetch(bank, ids, reader_digest=model.attachment.reader.digest, tensors="torch")
        yield [_again(chunk, whole.tensors) for chunk, whole in zip(batch, fetched, strict=True)]


def _again(chunk: kvbank.Chunk, tensors: Mapping[str, Any] | None) -> kvbank.NewChunk:
    """Return a chunk that was listed with its embedding, as it is written to another bank."""
    assert chunk.embedding is not None
    return kvbank.NewChunk(
        chunk.embedding,
        tensors,
        start=chunk.start,
        original_length=chunk.original_length,
        token_ids=chunk.token_ids,
        text=chunk.text,
        producer=chunk.producer,
    )


def _search(memory: Memory, vectors: NDArray[np.float32]) -> None:
    """Search for questions by their vectors, so that the recalls of what is found count."""
    if len(vectors):
        memory.client.retrieve(
            _BANK, vectors, top_k=memory.top_k, embedder_digest=memory.embedder.digest, payload=False
        )


def _group(model: MemoryModel, asker: Asker, name: str, facts: list[Planted]) -> dict[str, Any]:
    """Return how many of the facts are still in the bank, and how many of all are told by recall."""
    spans = [(each.start, each.start + each.original_length) for each in model.client.list_chunks(_BANK)]
    left = sum(any(begin <= own.answer < end for begin, end in spans) for own in facts)
    told = sum(bool(asker.ask(own.fact, own.answer, "complete", [MEMORY]).right[MEMORY]) for own in facts)
    stays, recalled = Share(left, len(facts)), Share(told, len(facts))
    return {"group": name, "stays": stays.document(), "recalled": recalled.document()}
