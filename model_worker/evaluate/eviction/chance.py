"""Chance decides here which chunk goes. What a policy gains beyond it, it gains by what it knows."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from model_worker.evaluate.eviction.policy import Policy, Run


@dataclass
class Chance(Policy):
    """Evicts a chunk that is drawn."""

    name = "random"
    about = "one that is drawn goes"

    def begin(self, run: Run) -> None:
        """Start with an empty bank."""
        self._draw = random.Random(f"kvbank-eviction:{run.seed}")
        self._live: list[int] = []

    def written(self, chunk: int) -> None:
        """Learn that a chunk is there."""
        self._live.append(chunk)

    def retrieved(self, chunks: Sequence[int], missed: Sequence[int]) -> None:
        """Do nothing, because no retrieval counts."""

    def removed(self, chunk: int) -> None:
        """Forget a chunk that was removed."""
        self._live.remove(chunk)

    def room(self, chunk: int) -> list[int]:
        """Return a chunk that is drawn."""
        return [self._live.pop(self._draw.randrange(len(self._live)))]
