"""What follows the commits of a store. This file owns that a follower that fails keeps neither the others nor the
engine from what comes after a commit."""

import logging
from collections.abc import Callable, Sequence

from memory_service.domain.model import Bank
from memory_service.storage.base import Follower, Vectors

_log = logging.getLogger(__name__)


class Followers:
    """Tells followers, in the order in which they were added, what was committed. It is told of one bank from one
    thread at a time."""

    def __init__(self) -> None:
        self._all: list[Follower] = []

    def append(self, follower: Follower) -> None:
        """Tell a follower of every commit from here on."""
        self._all.append(follower)

    def added(self, bank: Bank, ids: Sequence[int], vectors: Vectors) -> None:
        """Tell that chunks were added, with their embeddings [n, d]."""
        self._tell(lambda follower: follower.added(bank, ids, vectors))

    def removed(self, bank: Bank, ids: Sequence[int]) -> None:
        """Tell that chunks are gone."""
        self._tell(lambda follower: follower.removed(bank, ids))

    def altered(self, bank: Bank, ids: Sequence[int]) -> None:
        """Tell that chunks have other metadata, or are pinned, or no longer."""
        self._tell(lambda follower: follower.altered(bank, ids))

    def changed(self, bank: Bank) -> None:
        """Tell that a bank is new, or what it says of itself has changed."""
        self._tell(lambda follower: follower.changed(bank))

    def dropped(self, bank: Bank) -> None:
        """Tell that a bank is deleted."""
        self._tell(lambda follower: follower.dropped(bank))

    def purge(self, bank: Bank | None) -> int:
        """Let all followers forget for good what is gone, and return how many files were made anew. No thread calls
        this that tells them of commits. Errors: those of a follower."""
        return sum(follower.purge(bank) for follower in self._all)

    def _tell(self, tell: Callable[[Follower], None]) -> None:
        for follower in self._all:
            try:
                tell(follower)
            except Exception:
                _log.exception("a follower of the records misses a change")
