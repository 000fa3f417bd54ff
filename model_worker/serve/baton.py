"""One thread has the model at a time. This file owns the order in which threads get it.

A thread that has the model keeps it until it offers it, which it does between two tokens and between two pieces of a
prompt. It hands the model to the thread that comes next by `FairShare`, which may be itself; so the code of the model
needs no lock, and runs as if it were alone.

Threads that are at the same point, the forward of one token, wait with what they have prepared for it. The one of them
whose turn comes does the work of all, and is charged for it; then each of the others has the model for a moment, to go
on to its next token. So no thread waits for one that is not at that point, and one that only comes along pays nothing.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from model_worker.serve.fair_share import Claimant, FairShare

R = TypeVar("R")


@dataclass(eq=False, slots=True)
class _Waiting:
    """A thread that waits for the model. turn: set when the thread has it.

    work: what the thread waits with, and what becomes of that; None where it waits for the model alone.
    """

    turn: threading.Event = field(default_factory=threading.Event)
    work: "tuple[Any, Future[Any]] | None" = None

    @property
    def done(self) -> bool:
        """Tell whether the thread's work has been done by another thread."""
        return self.work is not None and self.work[1].done()


class Baton:
    """The right to use the model, which one thread has at a time. Requests of one session never wait for each other.

    most_together: threads whose work is done at once, at most.
    """

    def __init__(self, shares: FairShare, most_together: int = 1) -> None:
        self._shares, self._most = shares, most_together
        self._lock = threading.Lock()
        self._held = False
        self._waiting: dict[Claimant, _Waiting] = {}

    @contextmanager
    def holding(self, who: Claimant) -> Iterator[None]:
        """Have the model while the block runs, with a state of the random numbers that no other thread changes."""
        self._take(who)
        try:
            yield
        finally:
            self._pass_on()

    @property
    def joins(self) -> bool:
        """Tell whether the work of the thread that has the model may be done with that of others."""
        return self._most > 1 and bool(self._waiting)

    def offer(self, who: Claimant, cost: float) -> None:
        """Let others have the model if one of them comes next, and return when this thread has it again.

        cost: what this thread has used of it since it offered it last, in decoded tokens.
        """
        with self._lock:
            self._shares.charge(who, cost)
            if not self._waiting or self._next(who) == who:
                return
        with self.lending(who):
            pass

    @contextmanager
    def lending(self, who: Claimant) -> Iterator[None]:
        """Let others have the model while the block runs, which this thread has before and behind it."""
        state = _random_state()
        self._pass_on()
        try:
            yield
        finally:
            self._take(who)
            _set_random_state(state)

    def together(
        self, who: Claimant, prepared: Any, work: Callable[[Sequence[Any]], Sequence[R | Exception]], cost: float
    ) -> R:
        """Offer the model, and return what `work` has made of what was `prepared`, when this thread has it again.

        work: called by the thread whose turn comes, with what threads have prepared that wait with the same work;
        returns for each what was made of it, or the exception that its thread raises. cost: of the work, as in `offer`.
        """
        mine: Future[R] = Future()
        waiting = _Waiting(work=(prepared, mine))
        state = _random_state()
        with self._lock:
            self._waiting[who] = waiting
        self._pass_on()
        waiting.turn.wait()
        if not mine.done():
            self._do((prepared, mine), work)
            with self._lock:
                self._shares.charge(who, cost)
        _set_random_state(state)
        return mine.result()

    def _do(self, mine: "tuple[Any, Future[Any]]", work: Callable[[Sequence[Any]], Sequence[Any | Exception]]) -> None:
        """Do the work of this thread, and of those others that wait with theirs and have used the model least."""
        with self._lock:
            others = [who for who, each in self._waiting.items() if each.work is not None and not each.done]
            chosen = self._shares.in_order(others)[: self._most - 1]
            group = [mine, *(found for who in chosen if (found := self._waiting[who].work) is not None)]
        try:
            made = work([prepared for prepared, _ in group])
        except Exception as error:
            made = [error] * len(group)
        with self._lock:
            for (_, result), outcome in zip(group, made, strict=True):
                if isinstance(outcome, Exception):
                    result.set_exception(outcome)
                else:
                    result.set_result(outcome)

    def _take(self, who: Claimant) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            waiting = self._waiting[who] = _Waiting()
        waiting.turn.wait()

    def _pass_on(self) -> None:
        """Give the model to the thread that comes next, or to the first that comes."""
        with self._lock:
            if not self._waiting:
                self._held = False
                return
            waiting = self._waiting.pop(self._next())
        waiting.turn.set()

    def _next(self, *others: Claimant) -> Claimant:
        """Return who comes next of those that wait and `others`: first those whose work is done, since they are about
        to have more of it, which then is done with that of the others."""
        done = (who for who, waiting in self._waiting.items() if waiting.done)
        return next(done, None) or self._shares.next_of((*self._waiting, *others))


_State = tuple[torch.Tensor, list[torch.Tensor]]


def _random_state() -> _State:
    """Return the state of torch's random numbers, which all threads share: on the processor and on its GPUs."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), gpus


def _set_random_state(state: _State) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
