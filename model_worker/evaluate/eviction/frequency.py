"""MemLong's rule by retrieval count, as the service plans it (`memory_service.domain.eviction`, strict form)."""

from collections.abc import Sequence
from dataclasses import dataclass

from model_worker.evaluate.eviction.policy import Policy, Run, kept


@dataclass
class Frequency(Policy):
    """Evicts, of the chunks oldest first, those below `lower` percent, and of those below `upper` percent the least
    retrieved, down to `target` percent of the capacity.

    With lower 0, upper 100 and target 100 it is LFU. Source: MemLong (arXiv 2408.16967), section 3.3, with the
    deviations of docs/eviction.md.
    """

    lower: int = 10
    upper: int = 90
    target: int = 50

    name = "frequency"
    about = "MemLong's rule: the oldest go, then the least retrieved; the newest are protected (a policy of banks)"

    def begin(self, run: Run) -> None:
        """Start with an empty bank."""
        self._capacity = run.capacity
        self._counts: dict[int, int] = {}

    def written(self, chunk: int) -> None:
        """Learn that a chunk is the newest, and was never retrieved."""
        self._counts[chunk] = 0

    def retrieved(self, chunks: Sequence[int], missed: Sequence[int]) -> None:
        """Count each retrieval of a chunk."""
        for chunk in chunks:
            self._counts[chunk] += 1

    def removed(self, chunk: int) -> None:
        """Forget a chunk that was removed."""
        del self._counts[chunk]

    def room(self, chunk: int) -> list[int]:
        """Return the oldest, then the least retrieved of the middle, then what is needed of those protected."""
        live = list(self._counts)
        stored = len(live)
        lower, upper = stored * self.lower // 100, stored * self.upper // 100
        gone = live[:lower]
        too_many = max(stored - lower - kept(stored, self._capacity, self.target), 0)
        gone += sorted(live[lower:upper], key=lambda each: self._counts[each])[:too_many]
        needed = max(stored + 1 - self._capacity - len(gone), 0)
        spared = set(live).difference(gone)
        gone += [each for each in live if each in spared][:needed]
        for each in gone:
            del self._counts[each]
        return gone
