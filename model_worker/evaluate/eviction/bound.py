"""The clairvoyant bound is found here: the most hits that a policy could have that knows the whole trace.

In a memory a chunk that has gone is gone, so Belady's rule is not the best. What is: each chunk stays from its writing
up to some retrieval, or until the next write where it is of no use, at most `capacity` of them at once, and as many
retrievals as possible fall into the time that their chunks stay. That is a flow of greatest worth: the places of the
bank flow through time, from write to write; at its write a chunk takes a place, keeps it from one retrieval to the next
for a worth of 1 each, and gives it back. A linear program solves it, and its best flow has whole numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from model_worker.evaluate.eviction.trace import Retrieve, Trace, Write


@dataclass(slots=True)
class _Flow:
    """A flow through nodes. Each arc has a tail, a head, a worth, and the least and the most that flows through it."""

    tails: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    worth: list[int] = field(default_factory=list)
    bounds: list[tuple[int, float]] = field(default_factory=list)
    nodes: int = 0

    def arc(self, tail: int, head: int, worth: int = 0, bounds: tuple[int, float] = (0, 1)) -> None:
        """Add an arc between two nodes."""
        self.tails.append(tail)
        self.heads.append(head)
        self.worth.append(worth)
        self.bounds.append(bounds)

    def node(self) -> int:
        """Add a node, and return its number."""
        self.nodes += 1
        return self.nodes - 1

    def most(self, source: int, sink: int, amount: int) -> int:
        """Return the greatest worth of a flow of this amount."""
        import numpy as np
        from scipy.optimize import linprog
        from scipy.sparse import csr_array

        arcs = np.arange(len(self.tails))
        ones = np.ones(len(arcs))
        shape = self.nodes, len(arcs)
        leaving, coming = csr_array((ones, (self.tails, arcs)), shape), csr_array((ones, (self.heads, arcs)), shape)
        given = np.zeros(self.nodes)
        given[source], given[sink] = amount, -amount
        bounds = np.array(self.bounds)
        found = linprog(-np.array(self.worth), A_eq=leaving - coming, b_eq=given, bounds=bounds, method="highs")
        if not found.success:
            raise RuntimeError(f"the bound was not found: {found.message}")
        return round(-float(found.fun))


def most_hits(trace: Trace, capacity: int) -> int:
    """Return the most hits of a bank of `capacity` chunks, in which each chunk that is written is stored."""
    uses = _uses(trace)
    flow = _Flow()
    time = [flow.node() for _ in range(len(uses) + 1)]
    hits = 0
    for at, (own, later) in enumerate(uses):
        hits += own
        flow.arc(time[at], time[at + 1], bounds=(0, float("inf")))  # places that are free
        there = flow.node()
        flow.arc(time[at], there, bounds=(1, 1))  # it is stored, until the next write at least
        flow.arc(there, time[at + 1])
        for until, worth in later:
            before, there = there, flow.node()
            flow.arc(before, there, worth)
            flow.arc(there, time[until + 1])
    return hits + flow.most(time[0], time[-1], capacity)


def _uses(trace: Trace) -> Sequence[tuple[int, list[tuple[int, int]]]]:
    """Return for each write, in order, how often its chunk is found before the next write, and for later ones the
    numbers of the writes behind which it is found, with how often.

    A chunk that is removed is found no more, so that its removal needs no heed.
    """
    order: dict[int, int] = {}
    counts: list[dict[int, int]] = []
    for step in trace.steps:
        if isinstance(step, Write):
            order[step.chunk] = len(counts)
            counts.append({})
        elif isinstance(step, Retrieve):
            for chunk in step.chunks:
                own, now = counts[order[chunk]], len(counts) - 1
                own[now] = own.get(now, 0) + 1
    return [
        (own.get(at, 0), sorted((until, worth) for until, worth in own.items() if until > at))
        for at, own in enumerate(counts)
    ]
