"""The care that an index needs from time to time, beside searches and changes: full tails become fp16, small and
decayed segments are merged, big banks get lists. This file owns the bounds of the number of segments and of
tombstones."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memory_service.domain.model import IndexKind
from memory_service.search import gathering, ivf
from memory_service.search.index import BankIndex
from memory_service.search.ivf import Ivf
from memory_service.search.segments import Flat, Half, Segment
from memory_service.search.snapshots import Snapshots

_log = logging.getLogger(__name__)


@dataclass
class Upkeep:
    """Cares for one index. One thread at a time calls `do_next`.

    kind: what the bank wants. ivf_from: the rows from which on `auto` makes lists. stopping: tells whether the service
    ends.
    """

    index: BankIndex
    kind: IndexKind
    ivf_from: int
    snapshots: Snapshots
    stopping: Callable[[], bool]

    def __post_init__(self) -> None:
        # Live rows at which lists were found not to pay; tried again when the bank has doubled.
        self._in_vain = 0
        self._unfit: set[Flat] = set()

    def do_next(self) -> bool:
        """Do the most urgent thing, and return whether there was one. Errors: Stopped."""
        sealed = self.index.segments[:-1]
        lists = [segment for segment in sealed if isinstance(segment, Ivf)]
        if self._wants_lists(bool(lists)):
            if self._outgrown(lists):
                self._make_lists(lists)
                return True
        elif lists:
            self._replace(lists, gathering.half(lists))
            return True
        for segment in sealed:
            fresh = isinstance(segment, Flat) and segment not in self._unfit
            if fresh or segment.decayed:
                self._renew(segment)
                return True
        small = [
            segment for segment in sealed if isinstance(segment, Half) and segment.rows <= self.index.limits.small_rows
        ]
        if len(small) >= self.index.limits.most_small:
            self._replace(small, gathering.half(small))
            return True
        saved = [self.snapshots.save(segment) for segment in sealed if segment.saved != segment.rows]
        return any(saved)

    def purge(self) -> int:
        """Make every segment anew that has rows of chunks that are gone, so that neither memory nor files have their
        vectors; return how many there were. Errors: Stopped."""
        if self.index.segments[-1].dead:
            self.index.seal_tail()
        stale = [segment for segment in self.index.segments[:-1] if segment.dead]
        for segment in stale:
            self._renew(segment)
        return len(stale)

    def _wants_lists(self, has: bool) -> bool:
        live = len(self.index)
        if self.kind == "exact" or live < max(self.index.limits.fewest_in_lists, 2 * self._in_vain):
            return False
        # Once there are lists, half of the bound is enough: so a bank at the bound does not change its kind again and
        # again.
        return self.kind == "ivf" or live >= (self.ivf_from // 2 if has else self.ivf_from)

    def _outgrown(self, lists: Sequence[Ivf]) -> bool:
        """Tell whether too many rows are outside of lists."""
        within = sum(segment.live for segment in lists)
        outside = sum(segment.live for segment in self.index.segments if segment not in self._unfit) - within
        return outside > max(within // 4, self.index.limits.fewest_in_lists - 1)

    def _make_lists(self, lists: Sequence[Ivf]) -> None:
        """Put all rows into lists, which are trained anew where the bank has doubled since the last training."""
        self.index.seal_tail()
        sources = [segment for segment in self.index.segments[:-1] if segment not in self._unfit]
        live = sum(segment.live for segment in sources)
        known = lists[0].centroids if lists and live < 2 * lists[0].trained else None
        made = ivf.ivf(sources, known, self.stopping) if live >= self.index.limits.fewest_in_lists else None
        if made is not None and known is not None:
            made.trained = lists[0].trained
        if made is None or (self.kind == "auto" and made.probes > ivf.WORTH_PROBING * len(made.sizes)):
            _log.info("lists do not pay for %d vectors; the index stays exact", live)
            self._in_vain = len(self.index)
            return
        self._replace(sources, made)
        _log.info("%d vectors in %d lists, %d probed, recall %.3f", live, len(made.sizes), made.probes, made.recall)

    def _renew(self, segment: Segment) -> None:
        """Make a segment anew, without its dead rows, and as fp16 where that is possible."""
        made: Segment | None
        if not segment.live:
            self.index.replace([segment], [])
            self.snapshots.forget(segment)
            return
        if isinstance(segment, Ivf):
            made = ivf.ivf([segment], segment.centroids, self.stopping)
        else:
            made = gathering.half([segment])
        if made is None:
            assert isinstance(segment, Flat)
            made = gathering.flat([segment])
            self._unfit = {made, *self._unfit} - {segment}
        self._replace([segment], made)

    def _replace(self, old: Sequence[Segment], made: Segment | None) -> None:
        if made is None:
            raise RuntimeError("vectors that were fp16 do not fit into fp16")
        if made.rows:
            self.snapshots.save(made)
        self.index.replace(old, [made] if made.rows else [])
        for segment in old:
            self.snapshots.forget(segment)
