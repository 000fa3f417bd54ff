"""Requests for one model: how many run and wait, in which order they begin, and how they end.

Each request runs in a thread of its own, so that its own code is as plain as that of a program with one conversation.
This file owns three rules. The queue is bounded: what does not fit is refused at once, and told when to come back.
Requests of one session run one after the other, in their order. And a request ends at the next token once its caller
has left.
"""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from model_worker.errors import WorkerError
from model_worker.serve.baton import Baton
from model_worker.serve.fair_share import Claimant, FairShare
from model_worker.window.cache import MemoryCache
from model_worker.window.joint import forward, may_join, row_of

T = TypeVar("T")

# A prompt of so many tokens is taken to cost what one decoded token does: its tokens go through the model together.
_PROMPT_TOKENS = 8
# Seconds after which a refused caller may try again, for each request that waits.
_SECONDS_A_REQUEST = 1.0


class Busy(WorkerError):
    """As many requests wait as may; `retry_after` has the seconds after which to ask again."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests wait already; ask again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class Stopping(WorkerError):
    """The worker answers what it has begun, and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("this worker is stopping; ask another one")


class Left(WorkerError):
    """The caller has left before its answer began."""


class Turn:
    """What a request has while it runs: a share of the model, and whether its caller is still there."""

    def __init__(self, baton: Baton, who: Claimant, left: threading.Event) -> None:
        self._baton, self._who, self._left = baton, who, left
        self.fed = 0

    @contextmanager
    def holding_model(self, seed: int | None = None) -> Iterator[None]:
        """Have the model while the block runs, but for the moments in which `step` and `progress` hand it on.

        seed: of the random numbers that the block draws; None: another one each time. Raises Left.
        """
        with self._baton.holding(self._who):
            self._check()
            if seed is None:
                torch.seed()
            else:
                torch.manual_seed(seed)
            yield

    def lending_model(self) -> AbstractContextManager[None]:
        """Let others have the model while the block runs, which waits for something else."""
        return self._baton.lending(self._who)

    @property
    def left(self) -> bool:
        """Tell whether the caller has left."""
        return self._left.is_set()

    def step(self, model: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Return `model(**inputs)`, the forward of one token, before which others may have the model.

        It is made in one forward with those of other requests that are at this point too, where others wait, and the
        model computes the same then. What it returns differs from `model(**inputs)` by rounding. Others have the model
        too while this thread waits for a recall that was asked for ahead and has no answer yet.
        """
        cache = inputs.get("past_key_values")
        if isinstance(cache, MemoryCache) and (recall := cache.awaited) is not None:
            with self.lending_model():
                wait([recall])
        if self._baton.joins and may_join(model, inputs):
            return self._baton.together(self._who, row_of(inputs), partial(forward, model), 1.0)
        self._baton.offer(self._who, 1.0)
        return model(**inputs)

    def progress(self, done: int, total: int) -> None:
        """Let others have the model between two pieces of a prompt. done, total: tokens. Raises Left."""
        step = done - self.fed if done > self.fed else 0
        self.fed = done
        self._baton.offer(self._who, max(1.0, step / _PROMPT_TOKENS))
        self._check()

    def _check(self) -> None:
        if self.left:
            raise Left("the caller has left")


@dataclass(eq=False)
class Job(Generic[T]):
    """A request that waits or runs. result: what its work returns, or raises."""

    who: Claimant
    work: Callable[[Turn], T]
    result: "Future[T]" = field(default_factory=Future)
    left: threading.Event = field(default_factory=threading.Event)

    def leave(self) -> None:
        """Note that the caller has left, so that the work ends at the next token."""
        self.left.set()


class Engine:
    """Runs requests that share a model.

    most_running: requests that are answered at the same time, of which one caller has at most three quarters.
    most_waiting: those that wait besides. most_together: requests whose next tokens are decoded in one forward.
    """

    def __init__(self, *, most_running: int = 8, most_waiting: int = 64, most_together: int = 8) -> None:
        self._most_running, self._most_waiting = most_running, most_waiting
        self._most_of_one = max(1, most_running * 3 // 4)
        self._shares = FairShare()
        self._baton = Baton(self._shares, most_together)
        self._changed = threading.Condition()
        self._waiting: list[Job[Any]] = []
        self._running: dict[Job[Any], threading.Thread] = {}
        self._stopping = False

    def submit(self, caller: Hashable, session: Hashable, work: Callable[[Turn], T]) -> Job[T]:
        """Let `work` run as soon as its turn comes. caller, session: whose share of the model it takes.

        Raises Busy and Stopping.
        """
        job = Job(Claimant(caller, (caller, session)), work)
        with self._changed:
            if self._stopping:
                raise Stopping
            self._shares.enter(job.who)
            self._waiting.append(job)
            self._begin()
            if (waiting := len(self._waiting)) > self._most_waiting:
                self._waiting.remove(job)
                self._away(job)
                raise Busy(waiting - 1, max(1.0, waiting * _SECONDS_A_REQUEST / self._most_running))
        return job

    @property
    def waiting(self) -> int:
        """Return how many requests wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Return how many requests are being answered."""
        return len(self._running)

    def forget(self, job: Job[Any]) -> None:
        """Take a job whose caller has left out of the queue; one that runs ends at its next token."""
        job.leave()
        with self._changed:
            waited = job in self._waiting
            if waited:
                self._waiting.remove(job)
                self._away(job)
        if waited:  # behind the lock, since who waits for the result may do more than note it
            job.result.set_exception(Left("the caller has left"))

    def stop(self) -> None:
        """Take nothing new from now on."""
        with self._changed:
            self._stopping = True

    def wait_until_idle(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs or waits; tell whether that is so after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running and not self._waiting, timeout)

    def close(self) -> None:
        """Take nothing new, end what runs at the next token, and wait for that."""
        self.stop()
        with self._changed:
            jobs = [*self._waiting, *self._running]
        for job in jobs:
            self.forget(job)
        self.wait_until_idle()

    def _begin(self) -> None:
        """Begin those waiting jobs whose turn it is and for which there is room."""
        while len(self._running) < self._most_running and (ready := self._ready()):
            who = self._shares.next_of([job.who for job in ready])
            job = next(job for job in ready if job.who == who)
            self._waiting.remove(job)
            thread = threading.Thread(target=self._run, args=(job,), name="kvbank-request", daemon=True)
            self._running[job] = thread
            thread.start()

    def _ready(self) -> list[Job[Any]]:
        """Return jobs that may begin: the first of each session of which none runs, of callers that may have more."""
        of_caller = Counter(job.who.caller for job in self._running)
        taken = {job.who for job in self._running}
        found = []
        for job in self._waiting:
            if job.who not in taken and of_caller[job.who.caller] < self._most_of_one:
                found.append(job)
            taken.add(job.who)
        return found

    def _run(self, job: Job[Any]) -> None:
        """Do the work of a job in its thread, and begin the next one."""
        outcome: Any = None
        error: BaseException | None = None
        job.result.set_running_or_notify_cancel()
        try:
            outcome = job.work(Turn(self._baton, job.who, job.left))
        except BaseException as raised:
            error = raised
        with self._changed:
            del self._running[job]
            self._away(job)
            self._begin()
        if error is None:
            job.result.set_result(outcome)
        else:
            job.result.set_exception(error)

    def _away(self, job: Job[Any]) -> None:
        self._shares.leave(job.who)
        self._changed.notify_all()
