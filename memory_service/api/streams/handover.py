"""What a stream hands over between the event loop and the threads of a pool, many things at a time: a thread, or a
visit of the loop, for each of them would cost more than what is done there.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Generic, TypeVar

from memory_service.domain.fair_threads import FairThreads

T = TypeVar("T")


# The calls of a stream that one visit to a thread makes; then others may have it.
_MOST_CALLS = 64


class OneByOne:
    """Makes the calls of a tenant one after the other, in one thread of a pool at a time. Any thread may submit one."""

    def __init__(self, pool: FairThreads, tenant: str) -> None:
        self._pool, self._tenant = pool, tenant
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._running = False

    def submit(self, call: Callable[[], None]) -> None:
        """Have a call made behind those that were submitted before; it must not raise."""
        with self._lock:
            self._waiting.append(call)
            running, self._running = self._running, True
        if not running:
            self._pool.submit(self._tenant, partial(copy_context().run, self._run))

    def _run(self) -> None:
        while self._some_made():
            try:
                self._pool.submit(self._tenant, partial(copy_context().run, self._run))
            except RuntimeError:  # the pool begins nothing any more, so that the rest is made here
                continue
            return

    def _some_made(self) -> bool:
        """Make some of the calls that wait, and return whether there may be more."""
        for _ in range(_MOST_CALLS):
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return False
                call = self._waiting.popleft()
            call()
        return True


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
