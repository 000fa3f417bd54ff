"""Traces are replayed by several policies at several capacities, and the hits are counted beside the bound."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_worker.evaluate.eviction import policy
from model_worker.evaluate.eviction.bound import most_hits
from model_worker.evaluate.eviction.frequency import Frequency
from model_worker.evaluate.eviction.lru import Lru
from model_worker.evaluate.eviction.recency_half import RecencyHalf
from model_worker.evaluate.eviction.replay import replay
from model_worker.evaluate.eviction.trace import Trace
from model_worker.evaluate.interval import interval_of_few

SHIPPED = Path(__file__).parents[2] / "assets" / "traces"
# What a bank can have, with its defaults and with others; then what it cannot.
POLICIES = (
    *("frequency", "frequency:lower=0", "frequency:lower=0,target=90", "recency_half", "lru:target=50"),
    *("lru:target=90", "lru", "lfu", "fifo", "arc", "random", "belady"),
)
BOUND, LEVEL, ALL = "bound", "lru", "all"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """What one policy had of one trace. capacity: the share of the most chunks that the trace has at once; chunks: the
    same in chunks."""

    trace: str
    kind: str
    capacity: float
    chunks: int
    policy: str
    hits: int
    asked: int

    @property
    def rate(self) -> float:
        """Return the share of what was asked for that is still there."""
        return self.hits / self.asked


def kind_of(trace: str) -> str:
    """Return the kind of a trace by its name: the word before the first hyphen, or the whole name."""
    return trace.partition("-")[0]


def of_bank(spec: str) -> bool:
    """Tell whether a policy is one by which banks evict several chunks together."""
    found = spec != BOUND and policy(spec)
    return isinstance(found, Frequency | RecencyHalf) or (isinstance(found, Lru) and found.target < 100)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is replayed, and how.

    capacities: shares of the most chunks that a trace has at once, above 0. policies: as `policy` takes them. bound:
    whether the bound is measured too. Raises InputError for a policy that does not exist.
    """

    capacities: Sequence[float]
    policies: Sequence[str]
    bound: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for spec in self.policies:
            policy(spec)


def measure(traces: Sequence[Trace], plan: Plan, progress: Progress) -> dict[str, Any]:
    """Return all figures as plain values. progress: called with (stage, done, in all)."""
    begun, rows = time.perf_counter(), list[Row]()
    for done, trace in enumerate(traces):
        progress("traces", done, len(traces))
        rows += _rows(trace, plan)
    progress("traces", len(traces), len(traces))
    return {
        "traces": [_described(trace) for trace in traces],
        "rows": [_plain(row) for row in rows],
        "rates": list(_rates(rows)),
        "pairs": [pair for own, other in _alike(plan.policies) for pair in _differences(rows, own, other)],
        "cost": {
            "seconds": time.perf_counter() - begun,
            "replays": len(rows),
            "steps": len(rows) * sum(len(trace.steps) for trace in traces) // max(len(traces), 1),
        },
    }


def _described(trace: Trace) -> Mapping[str, Any]:
    own = {name: getattr(trace, name) for name in ("name", "written", "most", "asked", "evicted", "unknown", "lost")}
    return {**own, "kind": kind_of(trace.name)}


def _plain(row: Row) -> dict[str, Any]:
    """Return a row as plain values; kind and `asked` stand with its trace."""
    return {name: getattr(row, name) for name in ("trace", "capacity", "chunks", "policy", "hits", "rate")}


def _rows(trace: Trace, plan: Plan) -> Iterator[Row]:
    for share in plan.capacities:
        chunks = max(1, round(share * trace.most))
        hits = {spec: replay(trace, policy(spec), chunks, plan.seed).hits for spec in plan.policies}
        hits |= {BOUND: most_hits(trace, chunks)} if plan.bound else {}
        for spec, found in hits.items():
            yield Row(trace.name, kind_of(trace.name), share, chunks, spec, found, trace.asked)


def _rates(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield the mean rate over traces, of each kind and of all."""
    for share, spec in dict.fromkeys((row.capacity, row.policy) for row in rows):
        own = [row for row in rows if (row.capacity, row.policy) == (share, spec)]
        for kind, values in _by_kind([(row.kind, row.rate) for row in own]):
            yield {"capacity": share, "policy": spec, "kind": kind, **_mean(values)}


def _alike(policies: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of policies that are compared: each with LRU, and MemLong's rule with LRU down to the same target."""
    made = {spec: policy(spec) for spec in policies}
    recent = {own.target: spec for spec, own in made.items() if isinstance(own, Lru)}
    for spec, own in made.items():
        if isinstance(own, Frequency) and own.target in recent:
            yield spec, recent[own.target]
    if LEVEL in policies:
        yield from ((spec, LEVEL) for spec in policies if spec != LEVEL)


def _differences(rows: Sequence[Row], own: str, other: str) -> Iterator[dict[str, Any]]:
    """Yield by how much the rate of a policy is above that of another, paired by trace: means over all traces, and
    over those of each kind where the other is not the level of all."""
    rates = {(row.trace, row.capacity): row.rate for row in rows if row.policy == other}
    for share in dict.fromkeys(row.capacity for row in rows):
        of_own = [row for row in rows if (row.policy, row.capacity) == (own, share)]
        for kind, values in _by_kind([(row.kind, row.rate - rates[row.trace, share]) for row in of_own]):
            if kind == ALL or other != LEVEL:
                yield {"policy": own, "than": other, "capacity": share, "kind": kind, **_mean(values)}


def _by_kind(values: Sequence[tuple[str, float]]) -> Iterator[tuple[str, list[float]]]:
    """Yield all values, and those of each kind. values: each with its kind."""
    yield ALL, [value for _, value in values]
    for kind in dict.fromkeys(kind for kind, _ in values):
        yield kind, [value for own, value in values if own == kind]


def _mean(values: Sequence[float]) -> dict[str, Any]:
    found = interval_of_few(torch.tensor(values))
    return {"traces": len(values), "mean": found.mean, "width": found.known_width}
