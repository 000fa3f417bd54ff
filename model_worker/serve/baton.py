"""One thread has the model at a time. This file owns the order in which threads get it.

A thread that has the model keeps it until it offers it, which it does between two tokens and between two pieces of a
prompt. It hands the model to the thread that comes next by `FairShare`, which may be itself; so the code of the model
needs no lock, and runs as if it were alone.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model_worker.serve.fair_share import Claimant, FairShare


class Baton:
    """The right to use the model, which one thread has at a time. Requests of one session never wait for each other."""

    def __init__(self, shares: FairShare) -> None:
        self._shares = shares
        self._lock = threading.Lock()
        self._held = False
        self._waiting: dict[Claimant, threading.Event] = {}

    @contextmanager
    def holding(self, who: Claimant) -> Iterator[None]:
        """Have the model while the block runs, with a state of the random numbers that no other thread changes."""
        self._take(who)
        try:
            yield
        finally:
            self._pass_on()

    def offer(self, who: Claimant, cost: float) -> None:
        """Let others have the model if one of them comes next, and return when this thread has it again.

        cost: what this thread has used of it since it offered it last, in decoded tokens.
        """
        with self._lock:
            self._shares.charge(who, cost)
            if not self._waiting or self._shares.next_of((*self._waiting, who)) == who:
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

    def _take(self, who: Claimant) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            turn = self._waiting[who] = threading.Event()
        turn.wait()

    def _pass_on(self) -> None:
        """Give the model to the thread that comes next, or to the first that comes."""
        with self._lock:
            if not self._waiting:
                self._held = False
                return
            turn = self._waiting.pop(self._shares.next_of(self._waiting))
        turn.set()


_State = tuple[torch.Tensor, list[torch.Tensor]]


def _random_state() -> _State:
    """Return the state of torch's random numbers, which all threads share: on the processor and on its GPUs."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), gpus


def _set_random_state(state: _State) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
