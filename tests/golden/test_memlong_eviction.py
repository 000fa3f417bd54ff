"""MemLong's eviction traces, reproduced exactly. KVBANK_GOLDEN may name another set of the same layout."""

import json
from typing import Any

import numpy as np
import pytest

from memory_service.domain.eviction import Candidates, plan
from memory_service.domain.model import Capacity, Policy
from tests.golden.vectors import GOLDEN

FOLDER = GOLDEN / "memlong" / "a_eviction"


def _traces(field: str) -> list[Any]:
    traces = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    usable = [trace for trace in traces if field in trace and "BUGGY" not in trace["name"] + trace.get("note", "")]
    return [pytest.param(trace, id=trace["name"]) for trace in usable]


def _victims(sizes: dict[int, int], counts: dict[int, int], capacity: Capacity, policy: Policy, need: int) -> list[int]:
    """Return the victims among chunks (id -> size), oldest first."""
    rows = [(chunk_id, size, counts.get(chunk_id, 0), 0) for chunk_id, size in sizes.items()]
    candidates = Candidates(*np.array(rows, np.int64).reshape(-1, 4).T)
    return plan(candidates, capacity, policy, sum(sizes.values()), need).ids.tolist()


@pytest.mark.parametrize("trace", _traces("capacity_chunks"))
def test_frequency_follows_the_strict_traces(trace: dict[str, Any]) -> None:
    capacity = Capacity("chunks", trace["capacity_chunks"])
    policy = Policy("frequency", trace["lower_percent"], trace["upper_percent"], 50)
    live: dict[int, int] = {}
    for step in trace["steps"]:
        if step["op"] == "retrieve":
            for chunk_id in step["hit_ids_strict"]:
                live[chunk_id] += 1
        else:
            victims = _victims(dict.fromkeys(live, 1), live, capacity, policy, len(step["chunk_ids"]))
            assert bool(victims) == step["overflow_strict"]
            assert sorted(victims) == sorted(step.get("strict_evicted_ids", []))
            for victim in victims:
                del live[victim]
            live |= dict.fromkeys(step["chunk_ids"], 0)
        state = step["strict_state"]
        assert (list(live), list(live.values())) == (state["ids"], state["counters"])


@pytest.mark.parametrize("trace", _traces("memory_size_tokens"))
def test_recency_half_follows_the_release(trace: dict[str, Any]) -> None:
    policy = Policy("recency_half")
    live: list[int] = []
    for step in trace["steps"]:
        if step["op"] == "reset":
            live = []
        if step["op"] == "write":
            size = step["n_tokens"]
            capacity = Capacity("tokens", trace["memory_size_tokens"])
            victims = _victims(dict.fromkeys(live, size), {}, capacity, policy, size)
            assert bool(victims) == step["overflow"]
            live = [*(i for i in live if i not in victims), step["chunk_id"]]
        if step["state"]:
            assert live == step["state"][0]["faiss_chunk_ids"]


def test_there_are_traces() -> None:
    assert _traces("capacity_chunks")
    assert _traces("memory_size_tokens")
