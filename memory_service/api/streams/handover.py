"""What a stream hands over between the event loop and the threads of a pool, many things at a time: a thread, or a
visit of the loop, for each of them would cost more than what is done there.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import partial
from typing import Generic, TypeVar

from memory_service.domain.fair_threads import FairThreads

T = TypeVar("T")


# The things of a stream that one visit to a thread takes; then others may have it.
_MOST_THINGS = 64


class OneByOne(Generic[T]):
    """Takes things of a tenant in their order to one thread of a pool at a time. Any thread may submit some."""

    def __init__(self, pool: FairThreads, tenant: str, take: Callable[[list[T]], None]) -> None:
        """Have `take`, which must not raise, called with what was submitted, in order."""
        self._pool, self._tenant, self._take = pool, tenant, take
        self._lock = threading.Lock()
        self._waiting: list[T] = []
        self._running = False

    def submit(self, things: Sequence[T]) -> None:
        """Have things taken behind those that were submitted before."""
        with self._lock:
            self._waiting += things
            running, self._running = self._running, True
        if not running:
            self._begin()

    def _begin(self) -> None:
        self._pool.submit(self._tenant, partial(copy_context().run, self._run))

    def _run(self) -> None:
        while self._some_taken():
            try:
                self._begin()
            except RuntimeError:  # the pool begins nothing any more, so that the rest is taken here
                continue
            return

    def _some_taken(self) -> bool:
        """Take some of the things that wait, and return whether there are more."""
        with self._lock:
            some, self._waiting = self._waiting[:_MOST_THINGS], self._waiting[_MOST_THINGS:]
        self._take(some)
        with self._lock:
            self._running = bool(self._waiting)
        return self._running


class Gathering(Generic[T]):
    """Hands things from the event loop to one thread of a pool at a time, many together: the way of a thing from thread
    to thread takes longer than what is done for it there. It is used in the event loop."""

    def __init__(
        self,
        pool: FairThreads,
        tenant: str,
        take: Callable[[list[T]], None],
        lose: Callable[[list[T], Exception], None],
    ) -> None:
        """Have `take`, which must not raise, called with what was added, in order; and `lose` where no thread takes it
        any more."""
        self._thread = OneByOne(pool, tenant, take)
        self._lose = lose
        self._gathered: list[T] = []
        # Whether the event loop looks at them in its next turn; how many things were handed over and have not ended.
        self._looks = False
        self._at_work = 0

    def add(self, thing: T) -> None:
        """Add a thing, which is handed over in a later turn of the event loop."""
        self._gathered.append(thing)
        if not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_soon(self._hand_over)

    def ended(self, count: int) -> None:
        """Learn that so many of the things that were handed over have ended."""
        self._at_work -= count
        self._hand_over()

    def _hand_over(self) -> None:
        """Hand over what has gathered, when it is as much as is at work, or enough."""
        self._looks = False
        if self._gathered and len(self._gathered) >= min(self._at_work, _MOST_THINGS):
            gathered, self._gathered = self._gathered, []
            self._at_work += len(gathered)
            try:
                self._thread.submit(gathered)
            except RuntimeError as error:  # the pool begins nothing any more
                self._lose(gathered, error)


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
