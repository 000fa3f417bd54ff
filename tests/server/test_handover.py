"""What a stream hands over between the event loop and threads: in order, and many things at a time."""

import asyncio
import threading

from memory_service.api.streams.handover import Mailbox, OneByOne
from memory_service.domain.fair_threads import FairThreads


def test_things_are_taken_one_after_the_other_in_their_order() -> None:
    taken: list[int] = []
    running, hold, done = threading.Lock(), threading.Event(), threading.Event()

    def take(things: list[int]) -> None:
        assert running.acquire(blocking=False), "others are being taken"
        assert hold.wait(30)
        taken.extend(things)
        running.release()
        if taken[-1] == 199:
            done.set()

    pool = FairThreads(4, "test")
    row = OneByOne(pool, "", take)
    for number in range(200):
        row.submit([number])
    hold.set()
    assert done.wait(30)
    pool.close()
    assert taken == list(range(200))


def test_a_long_row_leaves_its_thread_to_others() -> None:
    """Keep a row from running dry: the call of another tenant, and one of the same tenant, are made between."""
    pool, calls_of_others = FairThreads(1, "test"), [threading.Event(), threading.Event()]

    def take(things: list[int]) -> None:
        if not all(other.is_set() for other in calls_of_others):
            row.submit(things[:1])

    row = OneByOne(pool, "red", take)
    row.submit([0])
    pool.submit("blue", calls_of_others[0].set)
    pool.submit("red", calls_of_others[1].set)
    assert all(other.wait(30) for other in calls_of_others)
    pool.close()
    assert pool.left() == 0


def test_a_row_is_finished_when_its_pool_begins_nothing_any_more() -> None:
    pool, hold, taken = FairThreads(1, "test"), threading.Event(), list[int]()

    def take(things: list[int]) -> None:
        assert hold.wait(30)
        taken.extend(things)

    row = OneByOne(pool, "", take)
    for number in range(200):
        row.submit([number])
    pool.close()
    hold.set()
    assert pool.left() == 0
    assert taken in ([], list(range(200)))  # none where it was closed before the first


def test_a_row_that_has_run_dry_goes_on() -> None:
    pool = FairThreads(1, "test")
    row = OneByOne[threading.Event](pool, "", lambda things: [thing.set() for thing in things].clear())
    for _ in range(50):
        done = threading.Event()
        row.submit([done])
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
