"""Retrieval-causal attention against logits recorded from MemLong's release (and from its formulas, where it is wrong).

Tolerance 1e-5 on logits, as the vectors' README asks.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.recalled import RecalledChunk
from tests.golden.vectors import Case, memlong_case, memlong_folders, memlong_model, worst
from tests.support.diagonal import rotated

TOLERANCE = 1e-5
SAME = 5e-6  # K-V, up to the rounding of another torch and transformers
STORED = ("memory.keys", "memory.values")
BACKENDS = ("sdpa", "eager")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RecordedMemory:
    """A memory per batch row that returns the chunks which the release retrieved, after checking that they are right.

    texts: the release's query text, by forward and row. ids: what it retrieved, by forward and row, oldest first.
    """

    query, needs_queries, query_tokens, cadence, recent = "with_input", False, 1 << 20, 1, 0

    def __init__(self, case: Case, ids: list[list[list[int]]], mask: Tensor | None):
        self.chunk, self.top_k = case.about["config"]["mem_group_size"], case.about["config"]["ret_group_size"]
        self.dtype = DTYPES[case.about["config"]["mem_dtype"]]
        self.layer = case.about["config"]["mem_layer"]
        self.table = json.loads((case.folder / "embeddings_by_text.json").read_text())
        self.ids = ids
        self.recorded = [
            [
                case.tensors[name][row][:, slice(None) if mask is None else mask[row].bool()]
                if name in case.tensors
                else None
                for name in STORED
            ]
            for row in range(len(ids[0]))
        ]
        self.asked: list[list[int]] = []
        self.forwards = 0
        self.rows: list[list[RecalledChunk]] = [[] for _ in ids[0]]
        self.lengths: list[int] = []

    def remember(self, rows: Sequence[Captured | None]) -> None:
        self.lengths.append(max(len(c) for c in rows if c is not None))
        for row, captured, recorded in zip(self.rows, rows, self.recorded, strict=True):
            assert captured is not None
            layer = captured.layers[self.layer]
            begin = sum(len(chunk.layers[self.layer][2]) for chunk in row)
            keys, values = (
                rounded(own, self.dtype, None if theirs is None else theirs[:, begin : begin + len(captured)])
                for own, theirs in zip((layer.keys, layer.values), recorded, strict=True)
            )
            row.append(
                RecalledChunk(len(row), captured.start, {self.layer: (keys, values, torch.arange(len(captured)))})
            )

    def recall(self, rows: Sequence[Sequence[int]]) -> list[list[RecalledChunk]]:
        ids = self.ids[self.forwards]
        self.forwards += 1
        self.asked = [list(row) for row in rows]
        return [[memory[i] for i in wanted] for memory, wanted in zip(self.rows, ids, strict=True)]

    def search(self, query: str, chunk_texts: list[str]) -> list[int]:
        """Search as the release does: exact, by inner product; ties go to the older chunk; the answer is oldest
        first."""
        scores = torch.tensor([self.table[t] for t in chunk_texts]) @ torch.tensor(self.table[query])
        return sorted(torch.sort(scores, descending=True, stable=True).indices[: self.top_k].tolist())


def rounded(own: Tensor, dtype: torch.dtype, theirs: Tensor | None) -> Tensor:
    """Return `own` as `dtype`; where it lies within SAME of a rounding boundary, to the side that the release took."""
    if dtype == own.dtype or theirs is None:
        return own.to(dtype)
    either = ((own - SAME).to(dtype) == theirs) | ((own + SAME).to(dtype) == theirs)
    return torch.where(either, theirs, own.to(dtype))


def attached(case: Case, backend: str) -> Attachment:
    model, gates = memlong_model(case)
    model.set_attn_implementation(backend)
    config = case.about["config"]
    return attach(
        model,
        mode="memlong",
        positions=config["position_type"].lower(),
        memory_layers=[config["mem_layer"]],
        retrieval_layers=config["ret_attn_layers"],
        gates=gates,
    )


def retrieved_ids(about: dict[str, Any], rows: int) -> list[list[list[int]]]:
    """Return what was retrieved by forward and batch row, oldest first."""
    if "oracle_retrieved_chunk_ids_per_forward" in about:
        return about["oracle_retrieved_chunk_ids_per_forward"]
    return [f.get("chunk_ids_in_concat_order", [[]] * rows) for f in about["forwards"]]


def pieces(config: dict[str, Any], tokens: int) -> list[tuple[int, int]]:
    """Cut the ids as MemLong's loop does: prefix chunks, then the last context as one piece."""
    prefix = max(tokens - config["last_context_length"], 0)
    begin, chunk = prefix - min(prefix, config["memory_size"]), config["mem_group_size"]
    return [(a, min(a + chunk, prefix)) for a in range(begin, prefix, chunk)] + [(prefix, tokens)]


ONE_PASS = [f for f in memlong_folders() if "input_ids" in json.loads((f / "case.json").read_text())]
DECODE = [f for f in memlong_folders() if "forced_tokens" in json.loads((f / "case.json").read_text())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", rotated(ONE_PASS, 0, every=2), ids=lambda f: f.name)
def test_logits_and_memory_of_the_chunk_loop(folder: Path, backend: str) -> None:
    case = memlong_case(folder)
    attachment = attached(case, backend)
    ids = torch.tensor(case.about["input_ids"])
    mask = torch.tensor(case.about["attention_mask"] or torch.ones_like(ids).tolist())
    expected = case.tensors["logits.oracle" if case.wrong() else "logits"]
    memory = RecordedMemory(case, retrieved_ids(case.about, len(ids)), mask)
    spans = pieces(case.about["config"], ids.shape[1])
    cache = MemoryCache(attachment, memory, window=memory.chunk)
    texts: list[list[str]] = [[] for _ in ids]
    logits = []
    with torch.no_grad():
        for number, (begin, end) in enumerate(spans):
            out = attachment.model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(out.logits)
            for row, text in enumerate(texts):
                query = " ".join(map(str, ids[row, begin:end].tolist()))  # the release decodes pads, we leave them out
                real = mask[row, begin:end].bool()
                assert memory.asked[row][-int(real.sum()) :] == ids[row, begin:end][real].tolist()
                query = " ".join(map(str, ids[row, begin:end].tolist()))  # the release decodes pads too, we do not
                if text and query in memory.table:  # where the release crashed, its table stops
                    assert memory.search(query, text) == memory.ids[number][row]
                text.append(query)
            cache.flush()
    real = mask[:, spans[0][0] :].bool()
    error = worst(torch.cat(logits, 1)[real], expected[real])
    print(f"{case.name} {backend}: {error:.1e}")
    assert error <= TOLERANCE
    check_memory(case, memory, mask)


def check_memory(case: Case, memory: RecordedMemory, mask: Tensor) -> None:
    """Check that the bank holds the release's K-V; the release's pads, which it masks for ever, are not in our bank."""
    if "memory.keys" not in case.tensors:
        return
    for row, chunks in enumerate(memory.rows):
        keys, values = (torch.cat([c.layers[memory.layer][i] for c in chunks], dim=1) for i in (0, 1))
        real = mask[row].bool()
        assert keys.dtype == case.tensors["memory.keys"].dtype
        assert worst(keys, case.tensors["memory.keys"][row][:, real]) <= SAME
        assert worst(values, case.tensors["memory.values"][row][:, real]) <= SAME
    if (mask == 1).all() and "chunk_lengths" in case.about:
        assert memory.lengths == case.about["chunk_lengths"][0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", DECODE, ids=lambda f: f.name)
def test_logits_and_window_of_decoding(folder: Path, backend: str) -> None:
    """Recorded chunk ids are fed, so that the release's wrong texts for overflown chunks do not matter."""
    case = memlong_case(folder)
    attachment = attached(case, backend)
    config, steps = case.about["config"], case.about["steps"]
    ids, forced = torch.tensor(case.about["prompt"]), torch.tensor(case.about["forced_tokens"])
    memory = RecordedMemory(case, retrieved_ids(case.about, len(ids)), None)
    cache = MemoryCache(attachment, memory, window=config["max_position_embeddings"])
    errors = []
    with torch.no_grad():
        prompt = []
        *prefix, last = pieces(config, ids.shape[1])
        for begin, end in prefix:
            prompt.append(attachment.model(ids[:, begin:end], past_key_values=cache).logits)
            cache.flush()
        prompt.append(attachment.model(ids[:, last[0] : last[1]], past_key_values=cache).logits)
        errors.append(worst(torch.cat(prompt, 1), case.tensors["logits_step000"]))
        for number, step in enumerate(steps[1:], start=1):
            logits = attachment.model(forced[:, number - 1 : number], past_key_values=cache).logits
            errors.append(worst(logits, case.tensors[f"logits_step{number:03d}"]))
            assert cache.physical == step["local_cache_len"]
            assert memory.lengths == step["lengths"][0]
            assert cache.get_seq_length() == ids.shape[1] + number
    print(f"{case.name} {backend}: {max(errors):.1e}")
    assert max(errors) <= TOLERANCE
    check_memory(case, memory, torch.ones(len(ids), sum(memory.lengths)))
