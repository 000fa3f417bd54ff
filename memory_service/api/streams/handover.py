"""What a stream hands over between the event loop and the threads of a pool, many things at a time: a thread, or a
visit of the loop, for each of them would cost more than what is done there.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Generic, TypeVar

T = TypeVar("T")


class OneByOne:
    """Makes calls one after the other, in one thread of a pool at a time. Any thread may submit a call."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []
        self._running = False

    def submit(self, call: Callable[[], None]) -> None:
        """Have a call made behind those that were submitted before; it must not raise."""
        with self._lock:
            self._waiting.append(call)
            running, self._running = self._running, True
        if not running:
            self._pool.submit(copy_context().run, self._run)

    def _run(self) -> None:
        while True:
            with self._lock:
                calls, self._waiting = self._waiting, []
                self._running = bool(calls)
            if not calls:
                return
            for call in calls:
                call()


class Mailbox(Generic[T]):
    """Takes things from threads to the event loop that has made it. The loop is woken once for all things that are
    posted before it looks."""

    def __init__(self, take: Callable[[list[T]], None]) -> None:
        """Have `take` called in the event loop with what was posted, in order."""
        self._loop = asyncio.get_running_loop()
        self._take = take
        self._lock = threading.Lock()
        self._posted: list[T] = []

    def post(self, thing: T) -> None:
        """Post a thing, in any thread."""
        with self._lock:
            self._posted.append(thing)
            waking = len(self._posted) > 1
        if not waking:
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        self._take(posted)
