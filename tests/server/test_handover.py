"""What a stream hands over between the event loop and threads: in order, and many things at a time."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from memory_service.api.streams.handover import Mailbox, OneByOne


def test_calls_are_made_one_after_the_other_in_their_order() -> None:
    made: list[int] = []
    running, hold = threading.Lock(), threading.Event()

    def call(number: int) -> None:
        assert running.acquire(blocking=False), "another call is being made"
        assert hold.wait(30)
        made.append(number)
        running.release()

    with ThreadPoolExecutor(4) as pool:
        calls = OneByOne(pool)
        for number in range(20):
            calls.submit(partial(call, number))
        hold.set()
    assert made == list(range(20))


def test_a_row_that_has_run_dry_goes_on() -> None:
    with ThreadPoolExecutor(1) as pool:
        calls = OneByOne(pool)
        for _ in range(50):
            done = threading.Event()
            calls.submit(done.set)
            assert done.wait(30)


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
