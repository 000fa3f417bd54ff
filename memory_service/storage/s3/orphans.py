"""Objects that no row names, and rows whose object is missing: the bucket and the records of a store are compared, page
by page.

This file owns that an object goes only after it was seen without a row twice: first when it was older than a grace,
then when its mark was. So neither a write that is still under way nor a clock that is wrong for a day costs a payload.
A row without an object is damage, and is looked at once more before it is called that.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

from memory_service.storage.base import Ids
from memory_service.storage.s3 import layout
from memory_service.storage.s3.bucket import Bucket, Listed

_log = logging.getLogger(__name__)
_LAST_ID = 2**63 - 1
_DAY = 86_400_000_000
# Rows without an object that one sweep takes out of service: of a bucket that has lost everything there are millions,
# and an operator should look first.
_MOST_LOST = 1000


class Records(Protocol):
    """What the records of a store say of its objects, and the marks on those that no row names. Times are in
    microseconds since 1970."""

    def banks(self) -> Iterable[str]:
        """Return the uids of all banks."""

    def chunks(self, bank_uid: str, after: int, upto: int) -> Ids:
        """Return the ids of the chunks of a bank that have a payload, from the first one after `after` up to `upto`,
        ascending; none of a bank that is not there."""

    def aside(self, bank_uid: str, after: int, upto: int) -> Ids:
        """Return the ids, within the same bounds, of chunks that are out of service and whose objects are kept for a
        person to look at."""

    def marked(self, keys: Sequence[str]) -> Mapping[str, int]:
        """Return those of the keys that have a mark, and when each got it."""

    def mark(self, keys: Sequence[str], time: int) -> None:
        """Give marks to keys that have none."""

    def unmark(self, keys: Sequence[str]) -> None:
        """Take the marks of keys away."""

    def unmark_before(self, time: int) -> None:
        """Take away all marks that were given before a time."""

    def lost(self, bank_uid: str, chunk_id: int) -> None:
        """Take a chunk out of service whose object is not there."""


@dataclass(slots=True)
class Swept:
    """What one sweep has done: objects that were marked, and deleted, and chunks that were taken out of service."""

    marked: int = 0
    deleted: int = 0
    lost: int = 0


class _Span(NamedTuple):
    """Objects of a bank, by chunk id, and the ids in question: those after `after` up to `upto`."""

    bank_uid: str
    after: int
    upto: int
    objects: Mapping[int, Listed]


class Orphans:
    """Compares the objects of a bucket with the records of its store."""

    def __init__(self, bucket: Bucket, records: Records, now_us: Callable[[], int]) -> None:
        """Go by the grace of the bucket's limits. now_us: tells the time, in microseconds since 1970."""
        self._bucket, self._records, self._now_us = bucket, records, now_us
        self._grace = round(bucket.limits.orphan_s * 1e6)

    def sweep(self, go_on: Callable[[], bool] = lambda: True) -> Swept:
        """Look at every object and every row once. go_on: asked before each page; the sweep ends where it says False.
        Errors: those of the bucket and the records; what was done until then stays done."""
        swept = Swept()
        for span in self._spans():
            if not go_on():
                return swept
            rows = set(self._records.chunks(span.bank_uid, span.after, span.upto).tolist())
            self._look_at_objects(span, rows, swept)
            self._look_at_rows(span, rows, swept)
        # Of objects that somebody else has deleted.
        self._records.unmark_before(self._now_us() - 4 * self._grace - _DAY)
        if swept.deleted:
            _log.info("%d objects of %s that no record names are deleted", swept.deleted, self._bucket.location)
        return swept

    def _spans(self) -> Iterator[_Span]:
        """Yield all ids of all banks: those of a page of the listing, those behind the last object of a bank, and all
        of a bank that has no object."""
        seen: set[str] = set()
        uid, last = "", _LAST_ID
        for page in self._bucket.pages(layout.below()):
            ours = [(*chunk, item) for item in page if (chunk := layout.chunk_of(item.key)) is not None]
            for bank_uid, group in groupby(ours, key=lambda found: found[0]):
                if bank_uid != uid:
                    yield from _rest(uid, last)
                    uid, last = bank_uid, 0
                    seen.add(uid)
                objects = {chunk_id: item for _, chunk_id, item in group}
                yield _Span(uid, last, max(objects), objects)
                last = max(objects)
        yield from _rest(uid, last)
        for bank_uid in self._records.banks():
            if bank_uid not in seen:
                yield from _rest(bank_uid, 0)

    def _look_at_objects(self, span: _Span, rows: set[int], swept: Swept) -> None:
        if not span.objects:
            return
        now, keys = self._now_us(), {item.key for item in span.objects.values()}
        named = rows.union(self._records.aside(span.bank_uid, span.after, span.upto).tolist())
        orphans = {
            item.key
            for chunk_id, item in span.objects.items()
            if chunk_id not in named and item.modified.timestamp() * 1e6 < now - self._grace
        }
        marked = self._records.marked(sorted(keys))
        due = sorted(key for key in orphans if marked.get(key, now) < now - self._grace)
        if due:
            self._bucket.delete(due)
        if ended := sorted({*due, *(marked.keys() - orphans)}):
            self._records.unmark(ended)
        if new := sorted(orphans - marked.keys()):
            self._records.mark(new, now)
        swept.deleted += len(due)
        swept.marked += len(new)

    def _look_at_rows(self, span: _Span, rows: set[int], swept: Swept) -> None:
        for chunk_id in sorted(rows - span.objects.keys()):
            if swept.lost >= _MOST_LOST:
                return
            # The chunk may be younger than the page of the listing, or have gone since.
            if self._is_there(span.bank_uid, chunk_id):
                continue
            if not len(self._records.chunks(span.bank_uid, chunk_id - 1, chunk_id)):
                continue
            self._records.lost(span.bank_uid, chunk_id)
            swept.lost += 1
            if swept.lost == _MOST_LOST:
                _log.error("%s lacks objects of %d chunks or more; is it whole?", self._bucket.location, swept.lost)

    def _is_there(self, bank_uid: str, chunk_id: int) -> bool:
        try:
            return self._bucket.size(layout.key(bank_uid, chunk_id)) > 0
        except FileNotFoundError:
            return False


def _rest(bank_uid: str, after: int) -> Iterator[_Span]:
    """Yield the ids of a bank behind its last object."""
    if after < _LAST_ID:
        yield _Span(bank_uid, after, _LAST_ID, {})
