"""What MemLong's released code does in the place of its rule: the oldest half goes."""

from collections.abc import Sequence
from dataclasses import dataclass

from model_worker.evaluate.eviction.policy import Policy, Run


@dataclass
class RecencyHalf(Policy):
    """Evicts the oldest half of the chunks, whatever was retrieved."""

    name = "recency_half"
    about = "MemLong's released code: the oldest half goes (a policy of banks)"

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
        """Return the older half, and of a single chunk that one."""
        gone = list(self._live)[: max(len(self._live) // 2, 1)]
        for each in gone:
            del self._live[each]
        return gone
