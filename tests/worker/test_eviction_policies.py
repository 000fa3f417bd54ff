"""The policies of a replay are those of the service, of caches and of papers, and none beats the clairvoyant bound."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from cachetools import FIFOCache
from hypothesis import given, settings
from hypothesis import strategies as st

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.domain.eviction import Candidates, plan
from memory_service.domain.model import Capacity
from memory_service.domain.model import Policy as BankPolicy
from model_worker.errors import InputError
from model_worker.evaluate.eviction import REGISTRY, Policy, policy
from model_worker.evaluate.eviction.bound import most_hits
from model_worker.evaluate.eviction.policy import Run
from model_worker.evaluate.eviction.replay import replay
from model_worker.evaluate.eviction.trace import Remove, Retrieve, Step, Trace, Write
from tests.support.diagonal import rotated

SPECS = (*REGISTRY, "frequency:lower=0,upper=100,target=100", "frequency:lower=0", "lru:target=50", "lru:target=90")
# Those that a bank can have, with its own words for them.
OF_BANKS = {
    "frequency": BankPolicy("frequency"),
    "frequency:lower=0,target=90": BankPolicy("frequency", 0, 90, 90),
    "frequency:lower=25,upper=40,target=30": BankPolicy("frequency", 25, 40, 30),
    "frequency:lower=0,upper=100,target=100": BankPolicy("frequency", 0, 100, 100),
    "recency_half": BankPolicy("recency_half"),
    "lru:target=50": BankPolicy("lru"),
    "lru": BankPolicy("lru", target=100),
}


@st.composite
def traces(draw: st.DrawFn, most: int = 60, removing: bool = True) -> Trace:
    """Draw a trace in which what is retrieved was written, and is not removed."""
    steps: list[Step] = [Write(0)]
    live, written = [0], 1
    for kind in draw(st.lists(st.sampled_from("wwrrrr" + "x" * removing), max_size=most)):
        if kind == "w":
            steps.append(Write(written))
            live.append(written)
            written += 1
        elif live and kind == "r":
            # The same few are drawn again and again.
            steps.append(Retrieve(tuple(sorted(draw(st.lists(st.sampled_from(live), min_size=1, max_size=4))))))
        elif live:
            steps.append(Remove((live.pop(draw(st.integers(0, len(live) - 1))),)))
    return Trace("drawn", steps)


def plainly(trace: Trace, bank: BankPolicy, capacity: int) -> tuple[int, set[int]]:
    """Replay a trace by the rule of the service itself; return the hits, and what is held at the end."""
    counts: dict[int, int] = {}
    used: dict[int, int] = {}
    hits = 0
    for now, step in enumerate(trace.steps):
        if isinstance(step, Write):
            rows = [(chunk, 1, count, used[chunk]) for chunk, count in counts.items()]
            candidates = Candidates(*np.array(rows, np.int64).reshape(-1, 4).T)
            for gone in plan(candidates, Capacity("chunks", capacity), bank, len(counts), 1).ids.tolist():
                del counts[gone]
            counts[step.chunk], used[step.chunk] = 0, now
        elif isinstance(step, Retrieve):
            for chunk in (each for each in step.chunks if each in counts):
                counts[chunk], used[chunk], hits = counts[chunk] + 1, now, hits + 1
        else:
            for chunk in step.chunks:
                counts.pop(chunk, None)
    return hits, set(counts)


@settings(max_examples=40, deadline=None)
@given(traces(), st.integers(1, 12), st.sampled_from(sorted(OF_BANKS)))
def test_policies_of_banks_are_those_of_the_service(trace: Trace, capacity: int, spec: str) -> None:
    found = replay(trace, policy(spec), capacity)
    assert (found.hits, found.held) == plainly(trace, OF_BANKS[spec], capacity)


@pytest.mark.parametrize(
    "spec", rotated(["frequency", "frequency:lower=0,target=90", "recency_half", "lru:target=50", "lru"], 1)
)
def test_a_bank_of_a_real_service_holds_what_the_replay_holds(tmp_path: Path, spec: str) -> None:
    """Test it with an axis for each chunk, so that a query finds the chunk that it asks for, or nothing."""
    random = np.random.default_rng(3)
    axes, bank, capacity = np.eye(40, dtype=np.float32), OF_BANKS[spec], 11
    steps: list[Step] = []
    hits = 0
    with LocalServer(tmp_path / "data", durability="os") as server, kvbank.connect(server.address) as client:
        given = kvbank.Policy(bank.kind, lower=bank.lower, upper=bank.upper, target=bank.target)
        sizes = kvbank.Capacity(chunks=capacity)
        client.create_bank("b", kv=None, embedding=kvbank.EmbeddingSpec("e", 40), capacity=sizes, policy=given)
        numbers: dict[int, int] = {}
        for written in range(len(axes)):
            ack = client.write("b", kvbank.NewChunk(axes[written], text="x"), embedder_digest="e", reader_digest="")
            numbers[ack.chunk_id] = written
            steps.append(Write(written))
            for _ in range(2):
                wanted = np.unique(random.geometric(0.08, 3).clip(max=written + 1) - 1)
                found = client.retrieve(
                    "b", axes[wanted], top_k=1, min_score=0.5, embedder_digest="e", reader_digest=""
                )
                hits += sum(map(len, found.queries))
                steps.append(Retrieve(tuple(wanted.tolist())))
        held = {numbers[chunk.chunk_id] for chunk in client.list_chunks("b")}
    replayed = replay(Trace("real", steps), policy(spec), capacity)
    assert (replayed.hits, set(replayed.held)) == (hits, held)
    assert 0 < hits < replayed.asked


@settings(max_examples=40, deadline=None)
@given(traces(), st.integers(1, 10), st.sampled_from(SPECS), st.integers(0, 3))
def test_no_policy_beats_the_bound(trace: Trace, capacity: int, spec: str, seed: int) -> None:
    found = replay(trace, policy(spec), capacity, seed)
    assert found.hits <= most_hits(trace, capacity)
    assert len(found.held) <= capacity
    if capacity >= trace.most:
        assert (found.hits, found.evicted) == (trace.asked, 0)


def best(trace: Trace, capacity: int) -> int:
    """Return the most hits over all ways to evict one chunk at a time, by trying all of them."""

    @lru_cache(None)
    def from_here(at: int, held: frozenset[int]) -> int:
        if at == len(trace.steps):
            return 0
        step = trace.steps[at]
        if isinstance(step, Retrieve):
            return sum(chunk in held for chunk in step.chunks) + from_here(at + 1, held)
        if isinstance(step, Remove):
            return from_here(at + 1, held.difference(step.chunks))
        if len(held) < capacity:
            return from_here(at + 1, held | {step.chunk})
        return max(from_here(at + 1, held - {gone} | {step.chunk}) for gone in held)

    return from_here(0, frozenset())


@settings(max_examples=40, deadline=None)
@given(traces(most=24), st.integers(1, 4))
def test_the_bound_is_what_the_best_choice_reaches(trace: Trace, capacity: int) -> None:
    assert most_hits(trace, capacity) == best(trace, capacity)


# -- caches: what is asked for and not there is fetched ---------------------------------------------------------------


def misses(own: Policy, requests: Sequence[int], capacity: int) -> int:
    """Return how often a cache with this policy has to fetch."""
    run = Run(capacity, Trace("cache", [Retrieve((each,)) for each in requests]))
    own.begin(run)
    held: set[int] = set()
    fetched = 0
    for run.now, asked in enumerate(requests):
        if asked in held:
            own.retrieved([asked], [])
            continue
        fetched += 1
        own.retrieved([], [asked])
        if len(held) == capacity:
            held.difference_update(own.room(asked))
        held.add(asked)
        own.written(asked)
        assert len(held) <= capacity
    return fetched


# Silberschatz, Galvin, Gagne: Operating System Concepts, chapter on page replacement.
PAGES = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
ANOMALY = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("spec", "requests", "capacity", "faults"),
    [
        ("fifo", PAGES, 3, 15),
        ("lru", PAGES, 3, 12),
        ("belady", PAGES, 3, 9),
        ("fifo", ANOMALY, 3, 9),
        ("fifo", ANOMALY, 4, 10),
    ],
)
def test_faults_of_the_textbook(spec: str, requests: Sequence[int], capacity: int, faults: int) -> None:
    assert misses(policy(spec), requests, capacity) == faults


pages = st.lists(st.integers(0, 12), max_size=120)


@settings(max_examples=40, deadline=None)
@given(pages, st.integers(1, 8))
def test_lru_and_fifo_are_those_of_the_libraries(requests: list[int], capacity: int) -> None:
    @lru_cache(capacity)
    def fetch(page: int) -> int:
        return page

    first_in: FIFOCache[int, int] = FIFOCache(capacity)
    fetched = 0
    for page in requests:
        fetch(page)
        if page not in first_in:
            fetched += 1
            first_in[page] = page
    assert misses(policy("lru"), requests, capacity) == fetch.cache_info().misses
    assert misses(policy("fifo"), requests, capacity) == fetched


@settings(max_examples=40, deadline=None)
@given(traces(), st.integers(1, 12))
def test_lfu_is_the_rule_by_frequency_without_its_bounds(trace: Trace, capacity: int) -> None:
    every = replay(trace, policy("frequency:lower=0,upper=100,target=100"), capacity)
    assert replay(trace, policy("lfu"), capacity) == every


def arc_misses(requests: Iterable[int], size: int) -> int:
    """ARC as figure 4 of the paper has it, case by case, with plain lists whose last item was used last."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p, fetched = 0.0, 0

    def make_room(x: int) -> None:
        if t1 and ((x in b2 and len(t1) == p) or len(t1) > p):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in requests:
        if x in t1 or x in t2:
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
            continue
        fetched += 1
        if x in b1:
            p = min(size, p + max(len(b2) / len(b1), 1))
            make_room(x)
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            p = max(0, p - max(len(b1) / len(b2), 1))
            make_room(x)
            b2.remove(x)
            t2.append(x)
        else:
            if len(t1) + len(b1) == size:
                if len(t1) < size:
                    b1.pop(0)
                    make_room(x)
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= size:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * size:
                    b2.pop(0)
                make_room(x)
            t1.append(x)
    return fetched


@settings(max_examples=40, deadline=None)
@given(pages, st.integers(1, 8))
def test_arc_is_that_of_the_paper(requests: list[int], size: int) -> None:
    assert misses(policy("arc"), requests, size) == arc_misses(requests, size)


def test_arc_keeps_what_is_used_again_from_a_scan_that_takes_it_from_lru() -> None:
    scan = [page for turn in range(20) for page in (*[0, 1, 2, 3] * 3, *range(100 * turn + 100, 100 * turn + 112))]
    assert misses(policy("arc"), scan, 8) < misses(policy("lru"), scan, 8)


# -- what docs/eviction.md says of the policies -----------------------------------------------------------------------


def hits(steps: list[Step], spec: str) -> int:
    return replay(Trace("case", steps), policy(spec), 20).hits


def test_old_facts_that_are_asked_for_seldom_stay_by_frequency_with_lower_0_alone() -> None:
    steps: list[Step] = [*map(Write, range(4)), *[Retrieve((0, 1, 2, 3))] * 2]
    for chunk in range(4, 204):
        steps += [Write(chunk), *([Retrieve((0, 1, 2, 3))] if chunk % 30 == 0 else [])]
    assert hits(steps, "frequency:lower=0") == 32
    assert hits(steps, "frequency") == hits(steps, "lru") == 8  # only those before the first eviction


def test_what_was_asked_for_often_keeps_a_new_topic_out_by_frequency() -> None:
    steps: list[Step] = []
    for chunk in range(100):
        steps += [Write(chunk), Retrieve(tuple(range(max(0, chunk - 9), chunk + 1)))]
    before = len(steps)
    for chunk in range(100, 200):
        steps += [Write(chunk), *([Retrieve((chunk - 6,))] if chunk >= 106 else [])]
    for spec, missed in (("lru:target=90", 0), ("frequency", 10), ("frequency:lower=0,target=90", 50), ("lfu", 80)):
        late = hits(steps, spec) - hits(steps[:before], spec)
        assert late == 94 if missed == 0 else late < 94 - missed, spec


def test_the_upper_bound_gives_new_chunks_time_to_be_found() -> None:
    steps: list[Step] = []
    for chunk in range(200):
        steps += [Write(chunk), *([Retrieve((chunk - 3,))] if chunk >= 3 else [])]
        steps += [Retrieve(tuple(range(10)))] if chunk % 10 == 9 else []
    protected, unprotected = (f"frequency:lower=0,upper={upper},target=100" for upper in (80, 100))
    assert hits(steps, protected) > 1.3 * hits(steps, unprotected)


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["", "mru", "lru:50", "lru:target=101", "lru:target=x", "lfu:target=3", "frequency:lower=60,upper=40"]
)
def test_what_is_no_policy_is_refused_with_what_there_is(spec: str) -> None:
    with pytest.raises(InputError, match=r"there are|write|lower"):
        policy(spec)


def test_a_policy_that_makes_no_room_is_a_defect() -> None:
    class Idle(REGISTRY["fifo"]):  # type: ignore[misc]
        def room(self, chunk: int) -> list[int]:
            return []

    with pytest.raises(RuntimeError, match="makes no room"):
        replay(Trace("t", [Write(number) for number, _ in enumerate(product("ab", repeat=2))]), Idle(), 2)
