"""What all policies of a replay share: a bank of so many chunks is full, a chunk is written, and some must go.

A policy is a dataclass whose fields are its parameters (percentages), so that it can be asked for by name, such as
`lru:target=90`. It learns of everything that happens to the bank, in order, and decides only which chunks go. A chunk
that has gone does not come back: unlike a cache, a memory has no slower place from which it could be had again.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import Field, dataclass
from typing import Any, ClassVar

from model_worker.evaluate.eviction.trace import Trace


@dataclass(slots=True)
class Run:
    """What a policy is started with: the capacity in chunks, the trace (for policies that know the future), a seed.

    now: the number of the step that is being done.
    """

    capacity: int
    trace: Trace
    seed: int = 0
    now: int = 0


class Policy(ABC):
    """A policy of eviction; name: by which it is asked for. about: one line of help."""

    # Each policy is a dataclass.
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    name: ClassVar[str]
    about: ClassVar[str]

    @abstractmethod
    def begin(self, run: Run) -> None:
        """Start with an empty bank."""

    @abstractmethod
    def written(self, chunk: int) -> None:
        """Learn that a chunk was written, and is in the bank; ids ascend."""

    @abstractmethod
    def retrieved(self, chunks: Sequence[int], missed: Sequence[int]) -> None:
        """Learn that a retrieval has found chunks of the bank, ascending; one that several queries found stands there
        several times. missed: chunks that have gone and would have been found too, which only a replay can know."""

    @abstractmethod
    def removed(self, chunk: int) -> None:
        """Learn that a chunk of the bank is deleted or has expired."""

    @abstractmethod
    def room(self, chunk: int) -> list[int]:
        """Return the chunks that go, at least one, because the bank is full and `chunk` is about to be written."""


def kept(stored: int, capacity: int, target: int) -> int:
    """Return how many of `stored` chunks an eviction leaves that goes down to `target` percent, and to one less than
    the capacity at most, as the service counts."""
    return min(stored - stored * (100 - target) // 100, capacity - 1)
