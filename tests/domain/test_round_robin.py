"""What waits is taken by owner in turn."""

import random
import threading
from collections import Counter

import pytest

from memory_service.domain.fair_threads import FairThreads
from memory_service.domain.round_robin import RoundRobin


def test_owners_take_turns_and_each_keeps_its_order() -> None:
    waiting: RoundRobin[str] = RoundRobin()
    for thing in ("a1", "a2", "a3", "b1", "c1", "c2"):
        waiting.put(thing[0], thing)
    taken = [waiting.take(), waiting.take()]
    waiting.put("d", "d1")
    waiting.put("a", "a4")
    while waiting:
        taken.append(waiting.take())
    assert taken == ["a1", "b1", "c1", "a2", "d1", "c2", "a3", "a4"]
    with pytest.raises(IndexError):
        waiting.take()


def test_no_owner_waits_for_more_than_one_thing_of_each_other() -> None:
    """Put and take at random: between a put and its take, no other owner is taken more often than what the owner had
    waiting before it, and once more."""
    chance, waiting = random.Random(7), RoundRobin[tuple[str, int]]()
    ahead: Counter[str] = Counter()
    passed: dict[tuple[str, int], Counter[str]] = {}
    allowed: dict[tuple[str, int], int] = {}
    for number in range(3000):
        if chance.random() < 0.52:
            thing = (chance.choice("aaaaaaaab"), number)
            waiting.put(thing[0], thing)
            passed[thing], allowed[thing] = Counter(), ahead[thing[0]] + 1
            ahead[thing[0]] += 1
        elif waiting:
            taken = waiting.take()
            ahead[taken[0]] -= 1
            counts = passed.pop(taken)
            assert all(count <= allowed[taken] for owner, count in counts.items() if owner != taken[0])
            for counts in passed.values():
                counts[taken[0]] += 1


def test_a_thread_that_is_free_takes_a_call_of_each_tenant_in_turn() -> None:
    threads, hold, made = FairThreads(1, "test"), threading.Event(), list[str]()
    first = threads.submit("noisy", lambda: hold.wait(30))
    calls = [threads.submit("noisy", lambda: made.append("noisy")) for _ in range(100)]
    gone = threads.submit("gone", lambda: made.append("gone"))
    quiet = threads.submit("quiet", lambda: made.append("quiet"))
    failing = threads.submit("failing", lambda: 1 // 0)
    assert gone.cancel()
    hold.set()
    assert first.result(30)
    quiet.result(30)
    assert isinstance(failing.exception(30), ZeroDivisionError)
    for call in calls:
        call.result(30)
    assert made.index("quiet") <= 1
    assert Counter(made) == {"noisy": 100, "quiet": 1}
    threads.close()
    assert threads.left() == 0
    with pytest.raises(RuntimeError):
        threads.submit("late", hold.wait)


def test_what_waits_is_cancelled_at_the_end_and_what_runs_is_waited_for() -> None:
    threads, begun, hold = FairThreads(1, "test"), threading.Event(), threading.Event()
    running = threads.submit("a", lambda: (begun.set(), hold.wait(30)))
    assert begun.wait(30)
    waiting = [threads.submit(tenant, hold.wait) for tenant in "ab"]
    threads.close()
    assert all(call.cancelled() for call in waiting)
    assert threads.left(0) == 1
    hold.set()
    assert threads.left(30) == 0
    assert running.result(0)[1]
