"""Threads that make the calls of many tenants. This file owns that a thread that is free takes a call of each tenant in
turn, so that one call of a tenant never waits for all those that another has waiting."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

from memory_service.domain.round_robin import RoundRobin

T = TypeVar("T")


class _Job(NamedTuple):
    """A call that waits for a thread, and the future of its result."""

    future: "Future[Any]"
    call: Callable[[], Any]


class FairThreads:
    """A pool of threads. Any thread may submit a call."""

    def __init__(self, count: int, name: str) -> None:
        """Make at most `count` threads, whose names begin with `name`, when they are needed."""
        self._threads = ThreadPoolExecutor(count, name)
        self._lock = threading.Lock()
        self._waiting: RoundRobin[_Job] = RoundRobin()
        self._unfinished: set[Future[Any]] = set()

    def submit(self, tenant: str, call: Callable[[], T]) -> "Future[T]":
        """Have a call made, in the turn of its tenant ("" where it is of none). Errors: RuntimeError after `close`."""
        job = _Job(Future(), call)
        with self._lock:
            # Each thread that this makes free, or finds free, takes whatever is next, not the call that came with it.
            self._threads.submit(self._make_next)
            self._waiting.put(tenant, job)
            self._unfinished.add(job.future)
        job.future.add_done_callback(self._unfinished.discard)
        return job.future

    def close(self) -> None:
        """Begin no call any more, and cancel those that wait; a second call does nothing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            while self._waiting:
                self._waiting.take().future.cancel()

    def left(self, patience: float | None = None) -> int:
        """Wait for the calls that run, at most so many seconds where that is said; return how many run then."""
        return len(wait(list(self._unfinished), patience).not_done)

    def _make_next(self) -> None:
        with self._lock:
            if not self._waiting:  # cancelled by `close`
                return
            future, call = self._waiting.take()
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            # An error refers to this frame: if the frame kept the future, the cycle would keep both in memory.
            del future, call
