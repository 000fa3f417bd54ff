"""Work that is begun for callers who do not wait for its end. This file owns that each piece is under way once, and
that only so many are at a time."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Generic, TypeVar

from memory_service.domain.cancellation import Cancellation

T = TypeVar("T")
_THREADS = 2


class Ahead(Generic[T]):
    """Runs work in threads of its own. Any thread may ask for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "kvbank-load")
        self._cancellation = Cancellation()
        self._under_way: dict[int, Future[T]] = {}

    def of(self, key: int, work: Callable[[], T]) -> "Future[T]":
        """Return the work of a key that is under way, or begin it. It goes on though the caller goes."""
        with self._lock:
            if (begun := self._under_way.get(key)) is None:
                begun = self._threads.submit(copy_context().run, partial(self._run, work))
                self._under_way[key] = begun
                begun.add_done_callback(partial(self._ended, key))
            return begun

    def _ended(self, key: int, work: "Future[T]") -> None:
        if self._under_way.get(key) is work:
            del self._under_way[key]

    def _run(self, work: Callable[[], T]) -> T:
        self._cancellation.enter()
        return work()

    def close(self) -> None:
        """Break off what is under way, and wait for its end."""
        self._cancellation.cancel()
        self._threads.shutdown(wait=True, cancel_futures=True)
