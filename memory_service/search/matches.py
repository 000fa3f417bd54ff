"""The ids of the chunks that a filter lets pass, kept in memory for filters that are asked about again and again, as
that of a session is. This file owns that they are what the store would answer: what was added or altered since is
looked at again, in a view that is later than its commit."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from memory_service.domain.limits import INDEX, IndexLimits
from memory_service.domain.model import Bank, Filter
from memory_service.storage.base import Ids, Vectors, View


@dataclass(eq=False)
class _Known:
    """What is known of a filter in a bank.

    words: what the filter says. ids: what it let pass, None before that was looked at; some may be gone. later: chunks
    to look at again, and `seen` how many there were before these. looking: held by the thread that brings `ids` up to
    date.
    """

    bank: Bank
    where: Filter
    words: str
    ids: Ids | None = None
    later: list[int] = field(default_factory=list)
    seen: int = 0
    looking: threading.Lock = field(default_factory=threading.Lock)

    @property
    def size(self) -> int:
        """Return how much is kept: the ids, and the letters of the filter, which may have 64 MiB of values."""
        return len(self.words) + (0 if self.ids is None else len(self.ids))


class Asked(NamedTuple):
    """A filter that is being asked about. until: how many changes were told by then, all of which a later view has."""

    known: _Known
    until: int


class Matches:
    """What the filters that were asked about last let pass. Threads share it. It implements
    `memory_service.storage.base.Follower`."""

    def __init__(self, limits: IndexLimits = INDEX) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        # By the bank and by what the filter says; by its words, because 1 equals True.
        self._known: OrderedDict[tuple[int, str], _Known] = OrderedDict()

    def asked(self, bank: Bank, where: Filter) -> Asked:
        """Begin to ask about a filter; open a view after this, and call `ids` with it."""
        key = (bank.bank_id, repr(where))
        with self._lock:
            known = self._known.setdefault(key, _Known(bank, where, key[1]))
            self._known.move_to_end(key)
            held = sum(each.size for each in self._known.values())
            while len(self._known) > 1 and (held > self._limits.matches or len(self._known) > self._limits.filters):
                held -= self._known.popitem(last=False)[1].size
            return Asked(known, known.seen + len(known.later))

    def ids(self, asked: Asked, view: View) -> Ids:
        """Return the ids [n], ascending, of the chunks that the filter lets pass; some may be gone. Errors:
        FlawedError."""
        known = asked.known
        with known.looking:
            with self._lock:
                again = known.later[: max(0, asked.until - known.seen)]
            if known.ids is None:
                known.ids = view.matching(known.bank, known.where)
            elif again:
                others = known.ids[~np.isin(known.ids, again)]
                known.ids = np.sort(np.concatenate([others, view.matching(known.bank, known.where, again)]))
            with self._lock:
                del known.later[: len(again)]
                known.seen += len(again)
            return known.ids

    # Changes

    def added(self, bank: Bank, ids: Sequence[int], _vectors: Vectors) -> None:
        """Learn that chunks were added."""
        self.altered(bank, ids)

    def removed(self, bank: Bank, ids: Sequence[int]) -> None:
        """Learn that chunks are gone."""
        self.altered(bank, ids)

    def altered(self, bank: Bank, ids: Sequence[int]) -> None:
        """Learn that chunks are to be looked at again. A filter for which these become too many begins anew."""
        with self._lock:
            for key in [key for key in self._known if key[0] == bank.bank_id]:
                self._known[key].later.extend(ids)
                if len(self._known[key].later) > self._limits.changes:
                    del self._known[key]

    def changed(self, _bank: Bank) -> None:
        """Learn that a bank says something else of itself, which filters do not go by."""

    def dropped(self, bank: Bank) -> None:
        """Learn that a bank is deleted."""
        with self._lock:
            for key in [key for key in self._known if key[0] == bank.bank_id]:
                del self._known[key]

    def purge(self, _bank: Bank | None) -> int:
        """Return 0, because no file has anything of this."""
        return 0
