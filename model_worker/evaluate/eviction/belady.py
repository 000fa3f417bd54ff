"""Belady's rule, which knows the future: the chunk that is asked for last goes.

For a cache, which can have every chunk again, no rule has more hits. A memory cannot: there the rule is good and not
the best, because it heeds when a chunk is asked for next, and not how often. The bound stands in bound.py.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from model_worker.evaluate.eviction.policy import Policy, Run
from model_worker.evaluate.eviction.trace import Retrieve


@dataclass
class Belady(Policy):
    """Evicts the chunk whose next retrieval is farthest away; of those that are never retrieved again, the oldest.

    Source: Belady, A study of replacement algorithms for a virtual-storage computer (1966), MIN.
    """

    name = "belady"
    about = "knows the future: what is asked for last goes (MIN, the best that a cache could do)"

    def begin(self, run: Run) -> None:
        """Look at the whole trace."""
        self._run = run
        self._next: dict[int, float] = {}
        # Next uses with their chunks, the last first (negative); what is not up to date is passed over.
        self._last: list[tuple[float, int]] = []
        self._uses: dict[int, list[int]] = {}
        for at, step in enumerate(run.trace.steps):
            for chunk in step.chunks if isinstance(step, Retrieve) else ():
                self._uses.setdefault(chunk, []).append(at)

    def written(self, chunk: int) -> None:
        """Learn that a chunk is there, and look when it is used next."""
        uses = self._uses.get(chunk, ())
        at = bisect_right(uses, self._run.now)
        self._next[chunk] = uses[at] if at < len(uses) else float("inf")
        heappush(self._last, (-self._next[chunk], chunk))

    def retrieved(self, chunks: Sequence[int], missed: Sequence[int]) -> None:
        """Look when the chunks are used next."""
        for chunk in chunks:
            self.written(chunk)

    def removed(self, chunk: int) -> None:
        """Forget a chunk that was removed."""
        del self._next[chunk]

    def room(self, chunk: int) -> list[int]:
        """Return the chunk that is asked for last."""
        while True:
            use, last = heappop(self._last)
            if self._next.get(last) == -use:
                del self._next[last]
                return [last]
