"""The loading of an index from its snapshots and the store. This file owns that it holds what the store holds: what no
snapshot has is read from the store, and what the store does not have (any more) is dead."""

import logging
from collections.abc import Iterator

import numpy as np

from memory_service.search.candidates import Read
from memory_service.search.index import BankIndex, tail_rows
from memory_service.search.segments import PIECE, Flat, Half, Ids, Segment, encode, fits, largest_norm
from memory_service.search.snapshots import Snapshots

_log = logging.getLogger(__name__)


def load(ids: Ids, read: Read, snapshots: Snapshots) -> BankIndex:
    """Load the index of the chunks of these ids, which ascend. read: reads their vectors."""
    limits = snapshots.limits
    segments, missing = _from_files(ids, snapshots)
    tails = [some for some in segments if isinstance(some, Flat) and some.room]
    tail = tails[0] if tails else Flat(snapshots.dimension, tail_rows(snapshots.dimension, limits))
    segments = [segment for segment in segments if segment is not tail]
    found = len(ids) - len(missing)
    _log.info("index %s: %d vectors from snapshots, %d from records", snapshots.folder.name, found, len(missing))
    while len(missing) > tail.room:
        segments.append(_sealed(missing[: limits.segment_rows], read, snapshots.dimension))
        missing = missing[limits.segment_rows :]
    tail.reserve(tail.rows + len(missing))
    for some in _batches(missing):
        tail.append(some, read(some)[1])
    return BankIndex(snapshots.dimension, segments, tail, limits)


def _from_files(ids: Ids, snapshots: Snapshots) -> tuple[list[Segment], Ids]:
    """Read the segments that have some of the ids, each id in one; return them, and the ids that are in none."""
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
