"""An index from its snapshots and the records. Owns that it holds what the records hold: what no snapshot has is read
from them, what they do not have (any more) is dead."""

import logging
from collections.abc import Iterator

import numpy as np

from memory_service.search.index import BankIndex, Read, tail_rows
from memory_service.search.segments import PIECE, Flat, Half, Ids, Segment, encode, fits, largest_norm
from memory_service.search.snapshots import Snapshots
from memory_service.search.upkeep import LARGEST_ROWS

_log = logging.getLogger(__name__)


def load(ids: Ids, read: Read, snapshots: Snapshots) -> BankIndex:
    """The index of the chunks `ids` (ascending); `read` gives their vectors."""
    segments, missing = _from_files(ids, snapshots)
    tails = [some for some in segments if isinstance(some, Flat) and some.room]
    tail = tails[0] if tails else Flat(snapshots.dimension, tail_rows(snapshots.dimension))
    segments = [segment for segment in segments if segment is not tail]
    found = len(ids) - len(missing)
    _log.info("index %s: %d vectors from snapshots, %d from records", snapshots.folder.name, found, len(missing))
    while len(missing) > tail.room:
        segments.append(_sealed(missing[:LARGEST_ROWS], read, snapshots.dimension))
        missing = missing[LARGEST_ROWS:]
    tail.reserve(tail.rows + len(missing))
    for some in _batches(missing):
        tail.append(some, read(some)[1])
    return BankIndex(snapshots.dimension, segments, tail)


def _from_files(ids: Ids, snapshots: Snapshots) -> tuple[list[Segment], Ids]:
    """Segments with what they share with `ids`, each id once; the ids that are in none."""
    segments, covered = [], np.zeros(len(ids) + 1, bool)
    known = np.append(ids, np.iinfo(np.int64).max)
    for segment in snapshots.load():
        mine = segment.ids[: segment.rows]
        places = np.searchsorted(ids, mine)
        here = known[places] == mine
        # A newer file has them: this one was merged into it, and a crash left it.
        if not here.any() or covered[places[here]].any():
            snapshots.forget(segment)
            continue
        covered[places[here]] = True
        segment.kill(np.sort(mine[~here]))
        segments.append(segment)
    return segments, ids[~covered[:-1]]


def _sealed(ids: Ids, read: Read, dimension: int) -> Segment:
    half = Half(dimension, ids)
    begin = 0
    for some in _batches(ids):
        vectors = read(some)[1]
        half.error = max(half.error, encode(vectors, half.codes[begin : begin + len(some)]))
        half.largest = max(half.largest, largest_norm(vectors))
        begin += len(some)
    if fits(half.error, half.largest):
        return half
    flat = Flat(dimension, len(ids))
    flat.reserve(len(ids))
    for some in _batches(ids):
        flat.append(some, read(some)[1])
    return flat


def _batches(ids: Ids) -> Iterator[Ids]:
    for begin in range(0, len(ids), PIECE):
        yield ids[begin : begin + PIECE]
