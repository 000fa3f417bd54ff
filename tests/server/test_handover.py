"""What a stream hands over between the event loop and threads: in order, and many things at a time."""

import asyncio
import threading
from functools import partial

from memory_service.api.streams.handover import Mailbox, OneByOne
from memory_service.domain.fair_threads import FairThreads


def test_calls_are_made_one_after_the_other_in_their_order() -> None:
    made: list[int] = []
    running, hold = threading.Lock(), threading.Event()

    def call(number: int) -> None:
        assert running.acquire(blocking=False), "another call is being made"
        assert hold.wait(30)
        made.append(number)
        running.release()

    pool, done = FairThreads(4, "test"), threading.Event()
    calls = OneByOne(pool, "")
    for number in range(200):
        calls.submit(partial(call, number))
    calls.submit(done.set)
    hold.set()
    assert done.wait(30)
    pool.close()
    assert made == list(range(200))


def test_a_long_row_of_calls_leaves_its_thread_to_others() -> None:
    """Keep a row from running dry: the call of another tenant, and one of the same tenant, are made between."""
    pool, calls_of_others = FairThreads(1, "test"), [threading.Event(), threading.Event()]
    calls = OneByOne(pool, "red")

    def call() -> None:
        if not all(other.is_set() for other in calls_of_others):
            calls.submit(call)

    calls.submit(call)
    pool.submit("blue", calls_of_others[0].set)
    pool.submit("red", calls_of_others[1].set)
    assert all(other.wait(30) for other in calls_of_others)
    pool.close()
    assert pool.left() == 0


def test_a_row_is_finished_when_its_pool_begins_nothing_any_more() -> None:
    pool, hold, made = FairThreads(1, "test"), threading.Event(), list[int]()
    calls = OneByOne(pool, "")
    calls.submit(lambda: made.append(hold.wait(30)))
    for number in range(200):
        calls.submit(partial(made.append, number))
    pool.close()
    hold.set()
    assert pool.left() == 0
    assert made in ([], [True, *range(200)])  # none where it was closed before the first


def test_a_row_that_has_run_dry_goes_on() -> None:
    pool = FairThreads(1, "test")
    calls = OneByOne(pool, "")
    for _ in range(50):
        done = threading.Event()
        calls.submit(done.set)
        assert done.wait(30)
    pool.close()


def test_the_loop_is_woken_once_for_all_that_comes_before_it_looks() -> None:
    async def run() -> list[list[int]]:
        looks: list[list[int]] = []
        come = asyncio.Event()

        def take(posted: list[int]) -> None:
            looks.append(posted)
            come.set()

        mailbox = Mailbox(take)

        def post() -> None:
            for number in range(1000):
                mailbox.post(number)

        for _ in range(2):
            come.clear()
            thread = threading.Thread(target=post)
            thread.start()
            thread.join()  # the loop looks at nothing meanwhile
            await come.wait()
        return looks

    assert asyncio.run(run()) == [list(range(1000))] * 2
