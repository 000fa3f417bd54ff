"""The policies of eviction against the same rules in plain Python, a loop a rule."""

from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_service.domain.errors import ServiceError
from memory_service.domain.eviction import Candidates, Victims, plan
from memory_service.domain.model import Capacity, Policy, PolicyKind

# Policies that make room.
EVICTING = [kind for kind in get_args(PolicyKind) if kind != "reject"]


class Live(NamedTuple):
    """A live chunk that is not pinned."""

    chunk_id: int
    size: int
    retrievals: int
    used: int


def plain_plan(
    live: Sequence[Live], capacity: Capacity, policy: Policy, usage: int, need: int
) -> list[tuple[int, str]]:
    """(chunk id, reason) in order; `live` oldest first."""
    if usage + need <= capacity.limit:
        return []
    keep = capacity.limit * policy.target // 100
    if capacity.unit == "chunks":
        stored = min(usage, capacity.limit)
        keep = stored - stored * (100 - policy.target) // 100
    keep = min(keep, capacity.limit - need)
    victims: list[tuple[Live, str]] = []

    def take(chunks: Sequence[Live], reason: str, until: int | None) -> None:
        left = usage - sum(chunk.size for chunk, _ in victims)
        for chunk in chunks:
            if until is not None and left <= until:
                return
            victims.append((chunk, reason))
            left -= chunk.size

    if policy.kind == "recency_half":
        take(live[: len(live) // 2], "oldest_half", None)
    elif policy.kind == "lru":
        take(sorted(live, key=lambda chunk: chunk.used), "least_recent", keep)
    else:
        assert policy.kind == "frequency", f"no plain rule says what {policy.kind} evicts"
        lower, upper = len(live) * policy.lower // 100, len(live) * policy.upper // 100
        take(live[:lower], "oldest", None)
        take(sorted(live[lower:upper], key=lambda chunk: chunk.retrievals), "least_retrieved", keep)
    gone = {chunk.chunk_id for chunk, _ in victims}
    take([chunk for chunk in live if chunk.chunk_id not in gone], "room", capacity.limit - need)
    return [(chunk.chunk_id, reason) for chunk, reason in victims]


chunk_lists = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 2**50)), max_size=40)


@given(
    chunk_lists,
    st.tuples(*[st.integers(0, 100)] * 3),
    st.integers(0, 30),
    st.integers(0, 20),
    st.sampled_from(EVICTING),
    st.sampled_from(["chunks", "tokens", "bytes"]),
)
def test_plan_agrees_with_the_plain_rule(chunks, bounds, need, pinned, kind, unit):
    """Plans are those of the plain rule. pinned: what chunks take that are no candidates."""
    live = [Live(i, 1 if unit == "chunks" else size, count, used) for i, (size, count, used) in enumerate(chunks)]
    usage = sum(chunk.size for chunk in live) + pinned
    capacity = Capacity(unit, max(usage, need, 1))
    lower, upper = sorted(bounds[:2])
    policy = Policy(kind, lower, upper, bounds[2])
    expected = plain_plan(live, capacity, policy, usage, need)
    freed = sum(live[chunk_id].size for chunk_id, _ in expected)
    columns = np.array(live, np.int64).reshape(-1, 4).T
    if usage - freed + need > capacity.limit:
        with pytest.raises(ServiceError, match="the bank is full"):
            plan(Candidates(*columns), capacity, policy, usage, need)
        return
    victims = plan(Candidates(*columns), capacity, policy, usage, need)
    assert list(zip(victims.ids.tolist(), victims.reasons(), strict=True)) == expected


@pytest.mark.parametrize("kind", ["frequency", "lru"])
def test_a_million_chunks_are_planned_by_the_same_rule(kind):
    total = 1_000_000
    random = np.random.default_rng(5)
    counts, used = random.geometric(0.3, total), random.integers(10**15, 2 * 10**15, total)
    candidates = Candidates(np.arange(total), np.ones(total, np.int64), counts, used)
    victims = plan(candidates, Capacity("chunks", total), Policy(kind), total, 1)
    ranked = used if kind == "lru" else counts[total // 10 : total * 9 // 10]
    first = 0 if kind == "lru" else total // 10
    expected = first + np.argsort(ranked, kind="stable")[: total // 2 - first]
    assert np.array_equal(victims.ids, np.concatenate([np.arange(first), expected]))
    assert Victims.from_bytes(victims.to_bytes()).reasons()[-1] == victims.reasons()[-1]
