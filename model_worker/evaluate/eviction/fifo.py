"""First in, first out: the oldest chunk goes."""

from collections.abc import Sequence
from dataclasses import dataclass

from model_worker.evaluate.eviction.policy import Policy, Run


@dataclass
class Fifo(Policy):
    """Evicts the oldest chunk, one at a time."""

    name = "fifo"
    about = "the oldest goes, one at a time"

    def begin(self, run: Run) -> None:
        """Start with an empty bank."""
        self._live: dict[int, None] = {}

    def written(self, chunk: int) -> None:
        """Learn that a chunk is the newest."""
        self._live[chunk] = None

    def retrieved(self, chunks: Sequence[int], missed: Sequence[int]) -> None:
        """Do nothing, because no retrieval counts."""

    def removed(self, chunk: int) -> None:
        """Forget a chunk that was removed."""
        del self._live[chunk]

    def room(self, chunk: int) -> list[int]:
        """Return the oldest chunk."""
        oldest = next(iter(self._live))
        del self._live[oldest]
        return [oldest]
