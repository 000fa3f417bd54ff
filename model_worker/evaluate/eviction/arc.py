"""ARC, the adaptive replacement cache: it balances what was used lately against what was used more than once."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from model_worker.evaluate.eviction.policy import Policy, Run


@dataclass
class Arc(Policy):
    """Evicts by two lists, of chunks that were used once (t1) and more often (t2), each least recently used first.

    The ids of chunks that have gone stay in two further lists (b1, b2). When one of them is asked for, the list that it
    came from gets more room. Source: Megiddo and Modha, ARC: A Self-Tuning, Low Overhead Replacement Cache (FAST 2003),
    figure 4. Deviation: a chunk that is asked for in vain stays gone, because a memory cannot fetch it again; it goes
    to t2 where it is written again, which is what a cache does.
    """

    name = "arc"
    about = "adaptive replacement cache: lists of what was used once and more often share the room"

    def begin(self, run: Run) -> None:
        """Start with an empty bank, and no preference."""
        self._capacity, self._wanted = run.capacity, 0.0
        self._t1, self._t2, self._b1, self._b2 = (OrderedDict[int, None]() for _ in range(4))

    def written(self, chunk: int) -> None:
        """Learn that a chunk is used for the first time, or again where it is known as gone."""
        again = chunk in self._b1 or chunk in self._b2
        self._b1.pop(chunk, None)
        self._b2.pop(chunk, None)
        (self._t2 if again else self._t1)[chunk] = None

    def retrieved(self, chunks: Sequence[int], missed: Sequence[int]) -> None:
        """Learn that chunks are used again, and want more room for the list from which one has gone too soon."""
        for chunk in chunks:
            self._t1.pop(chunk, None)
            self._t2.pop(chunk, None)
            self._t2[chunk] = None
        for chunk in missed:
            if chunk in self._b1:
                self._wanted = min(self._wanted + max(len(self._b2) / len(self._b1), 1), self._capacity)
            elif chunk in self._b2:
                self._wanted = max(self._wanted - max(len(self._b1) / len(self._b2), 1), 0)

    def removed(self, chunk: int) -> None:
        """Forget a chunk that was removed."""
        self._t1.pop(chunk, None)
        self._t2.pop(chunk, None)

    def room(self, chunk: int) -> list[int]:
        """Return the least recently used chunk of the list that has more than its room."""
        if chunk in self._b1 or chunk in self._b2:
            return [self._replaced(chunk)]
        if len(self._t1) + len(self._b1) >= self._capacity:
            if len(self._t1) >= self._capacity:  # it fills the bank: its first goes without a trace
                return [self._t1.popitem(last=False)[0]]
            self._b1.popitem(last=False)
        elif len(self._t1) + len(self._t2) + len(self._b1) + len(self._b2) >= 2 * self._capacity:
            self._b2.popitem(last=False)
        return [self._replaced(chunk)]

    def _replaced(self, chunk: int) -> int:
        """Take the first of t1 or of t2 out of the bank, and remember its id."""
        used_once = len(self._t1)
        from_first = used_once > self._wanted or (chunk in self._b2 and used_once == self._wanted)
        if used_once and (from_first or not self._t2):
            gone, _ = self._t1.popitem(last=False)
            self._b1[gone] = None
        else:
            gone, _ = self._t2.popitem(last=False)
            self._b2[gone] = None
        return gone
