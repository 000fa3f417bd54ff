"""LFU, least frequently used: what was retrieved least often goes, the older first among equals."""

from collections.abc import Sequence
from dataclasses import dataclass

from model_worker.evaluate.eviction.policy import Policy, Run


@dataclass
class Lfu(Policy):
    """Evicts the chunk that was retrieved least often since it was written; of equal ones the oldest."""

    name = "lfu"
    about = "the least often retrieved goes, one at a time, the older first among equals"

    def begin(self, run: Run) -> None:
        """Start with an empty bank."""
        self._counts: dict[int, int] = {}

    def written(self, chunk: int) -> None:
        """Learn that a chunk is there, and was never retrieved."""
        self._counts[chunk] = 0

    def retrieved(self, chunks: Sequence[int], missed: Sequence[int]) -> None:
        """Count each retrieval of a chunk."""
        for chunk in chunks:
            self._counts[chunk] += 1

    def removed(self, chunk: int) -> None:
        """Forget a chunk that was removed."""
        del self._counts[chunk]

    def room(self, chunk: int) -> list[int]:
        """Return the least often retrieved chunk."""
        least = min(self._counts, key=self._counts.__getitem__)  # of equal ones the first, which is the oldest
        del self._counts[least]
        return [least]
