"""Threads for calls that block. This file owns four rules: calls that look at many chunks or banks leave threads for
calls that do not; no kind of call takes all threads of the former, and no caller all threads of a kind; tenants take
turns at the threads that are left; and no call outlives its caller by more than a step.

Everything here is used in the event loop. A call runs with the context of its caller, so that its lines in the log
carry the request.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

from memory_service.api.calls import running
from memory_service.api.calls.fairness import FairTurns
from memory_service.domain.cancellation import Cancellation
from memory_service.domain.fair_threads import FairThreads

T = TypeVar("T")
_log = logging.getLogger(__name__)


class StorageThreads:
    """Two pools of `count` threads each: `pool` for short calls and for the bytes of chunks, another for those that
    look at many chunks or banks."""

    def __init__(self, count: int) -> None:
        self.pool = FairThreads(count, "kvbank-storage")
        self._wide = FairThreads(count, "kvbank-search")
        most = max(1, count * 3 // 4)
        self._turns: defaultdict[str, FairTurns] = defaultdict(lambda: FairTurns(most))
        self._cancellations: dict[Future[Any], Cancellation] = {}

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a short call, which waits for no turn, and return its result."""
        return await self.waited(self.begun(self.pool, partial(call, *arguments)))

    @asynccontextmanager
    async def turn(self, kind: str, *, short: bool = False) -> AsyncIterator["Turn"]:
        """Wait until a call may have a thread, and yield its turn, which ends with the block, or with the thread where
        that is later. kind: the name of the method. short: whether the call looks at few chunks and banks."""
        owner, turn = running.current().owner, Turn(self, self.pool if short else self._wide)
        give = partial(self._turns[kind].give, owner)
        await self._turns[kind].take(owner)
        try:
            yield turn
        finally:
            if turn.job is None:
                give()
            else:
                turn.job.add_done_callback(partial(_later, asyncio.get_running_loop(), give))

    def begun(self, pool: FairThreads, call: Callable[[], T]) -> "Future[T]":
        """Begin a call in a pool, with what `waited` needs to cancel it."""
        cancellation, context = Cancellation(), copy_context()
        context.run(cancellation.enter)
        job = pool.submit(running.current().owner.tenant, partial(context.run, call))
        self._cancellations[job] = cancellation
        job.add_done_callback(self._forget)
        return job

    def _forget(self, job: "Future[Any]") -> None:
        self._cancellations.pop(job, None)

    async def waited(self, job: "Future[T]") -> T:
        """Wait for a call that has begun, and return its result. When the caller goes, the thread is told to stop."""
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            self._cancel(job)
            raise
        finally:
            # The job refers to its error, and the error to this frame: if the frame kept the job, the cycle would keep
            # all three in memory.
            del job

    def _cancel(self, job: "Future[Any]") -> None:
        if not job.cancel() and (cancellation := self._cancellations.get(job)) is not None:
            cancellation.cancel()

    def close(self, patience: float) -> None:
        """Begin no call any more, cancel those that run, and wait for them, at most `patience` seconds. This blocks."""
        until = time.monotonic() + patience
        for pool in (self.pool, self._wide):
            pool.close()
        for cancellation in list(self._cancellations.values()):
            cancellation.cancel()
        for pool in (self.pool, self._wide):
            if left := pool.left(max(until - time.monotonic(), 0)):
                _log.error("%d calls in storage threads did not end within %.1f s", left, patience)


class Turn:
    """The turn of a call: with it, the call may use one thread at a time."""

    def __init__(self, threads: StorageThreads, pool: FairThreads) -> None:
        self._threads, self._pool = threads, pool
        self.job: Future[Any] | None = None

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a call in a storage thread, and return its result. The calls of a turn come one after the other."""
        self.job = self._threads.begun(self._pool, partial(call, *arguments))
        try:
            return await self._threads.waited(self.job)
        finally:
            if self.job.done():
                self.job = None  # with its error; see `waited`

    async def run_to_its_end(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a call as `run` does. Where the caller goes, this returns only when the thread has ended, so that what
        the call held in memory is free then."""
        try:
            return await self.run(call, *arguments)
        finally:
            if self.job is not None and not self.job.done():
                await asyncio.gather(asyncio.wrap_future(self.job), return_exceptions=True)


def _later(loop: asyncio.AbstractEventLoop, call: Callable[[], None], _job: "Future[Any]") -> None:
    """Make a call in the event loop, where that is still open."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
