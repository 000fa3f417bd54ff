"""The candidates of a search: the rows that may be among the best of a query. This file owns that no such row is
missed, also at the border of the top k: segments score roughly, with a bounded error, and rows whose bounds reach the
border are all taken. Their true vectors decide."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memory_service.domain import cancellation
from memory_service.search.segments import Bits, Flat, Ids, Segment, bits_of

Vectors = NDArray[np.float32]
# Reads the true vectors [m, d] of those of the ids (ascending) that still exist; returns these ids [m] with them.
Read = Callable[[Ids], tuple[Ids, Vectors]]

NO_IDS: Ids = np.empty(0, np.int64)
# More candidates than hits that are asked for, so that most searches need one round.
SPARE = 56
_WIDER = 4
_LARGEST_SCORE = float(np.finfo(np.float32).max)


class Selection(NamedTuple):
    """Says which chunks may be found: those that are `allowed` (all, for None) and not `excluded`. Ids ascend."""

    allowed: Ids | None = None
    excluded: Ids = NO_IDS


ALL = Selection()


class Portion(NamedTuple):
    """A segment with the rows that count: those whose bit is set, `number` of them (all, where `bits` is None). Over
    all portions, its rows are numbered from `begin` on."""

    segment: Segment
    bits: Bits | None
    number: int
    begin: int


def portions_of(segments: Sequence[Segment], selection: Selection) -> list[Portion]:
    """Return the portions of the segments of which any row counts."""
    portions, begin = [], 0
    for segment in segments:
        # First, because a tail may grow meanwhile.
        rows = segment.rows
        if (portion := _portion(segment, rows, selection, begin)) is not None:
            portions.append(portion)
            begin += rows
    return portions


def _portion(segment: Segment, rows: int, selection: Selection, begin: int) -> Portion | None:
    bits = segment.bits if segment.dead else None
    excluded = segment.rows_of(selection.excluded) if len(selection.excluded) else selection.excluded
    if selection.allowed is None and not len(excluded):
        return Portion(segment, bits, rows - segment.dead, begin)
    chosen = np.ones(rows, bool)
    if selection.allowed is not None:
        chosen[:] = False
        chosen[_below(rows, segment.rows_of(selection.allowed))] = True
    chosen[_below(rows, excluded)] = False
    if chosen.all():  # as where a session has its bank alone
        return Portion(segment, bits, rows - segment.dead, begin)
    packed = bits_of(chosen)
    if bits is not None:
        packed &= bits[: len(packed)]
    count = int(np.bitwise_count(packed).sum())
    return Portion(segment, packed, count, begin) if count else None


def _below(rows: int, some: Ids) -> Ids:
    return some[some < rows]


def candidates_of(portions: Sequence[Portion], queries: Vectors, top_k: int) -> list[Ids]:
    """Choose, for each query, the numbers of all rows that can be among its best, and of few others."""
    chosen: list[Ids] = [NO_IDS] * len(queries)
    norms = np.sqrt(np.einsum("nd,nd->n", queries, queries, dtype=np.float64))[:, None]
    pending, width = np.arange(len(queries)), top_k + SPARE
    while len(pending):
        cancellation.check()
        rough = [_rough(portion, queries[pending], norms[pending], width) for portion in portions]
        lower, upper, rows = (np.concatenate(parts, axis=1) for parts in zip(*rough, strict=True))
        border = _border(lower, top_k)
        # A segment is done when it has no more rows, or none that reaches the border.
        done = np.ones(len(pending), bool)
        for _, its_upper, its_rows in rough:
            done &= (its_rows[:, -1] < 0) | (its_upper[:, -1] < border)
        keep = (upper >= border[:, None]) & (rows >= 0)
        for i in np.flatnonzero(done).tolist():
            chosen[pending[i]] = rows[i, keep[i]]
        pending, width = pending[~done], width * _WIDER
    return chosen


def _rough(
    portion: Portion, queries: Vectors, norms: NDArray[np.float64], width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], Ids]:
    """Bound the scores of the best rows of a portion, for queries [n, d] of these norms.

    Returns lower and upper bounds, and numbers of rows, [n, w] each and descending; -inf and -1 where there are no more
    rows.
    """
    segment = portion.segment
    scaled, factors = _scaled(queries, norms, segment.largest)
    # One more than there are now (a tail may have grown), so that -1 at the end says that these are all.
    found, rows = segment.search(scaled, min(width, segment.rows + 1), portion.bits, portion.number / segment.rows)
    none = rows < 0
    scores = found.astype(np.float64)
    if factors is not None:
        scores /= factors
    scores[none] = -np.inf
    doubt = segment.doubt
    rounding = segment.dimension * 2.0**-23 * (segment.largest + doubt)
    # The last term is for scores that are too small for float32.
    margins = norms * (doubt + rounding) + 2.0**-148
    rows = rows + portion.begin
    rows[none] = -1
    return scores - margins, scores + margins, rows


def _scaled(queries: Vectors, norms: NDArray[np.float64], largest: float) -> tuple[Vectors, NDArray[np.float64] | None]:
    """Multiply queries by powers of two with which no product leaves float32. Returns the queries and the factors; None
    where they are as they were."""
    if float(norms.min()) * largest > 1e-20 and float(norms.max()) * largest < 1e30:
        return queries, None
    exponent = -np.frexp(norms)[1] + np.clip(-np.frexp(largest)[1], -120, 120)
    factors = np.ldexp(1.0, exponent)
    return (queries * factors).astype(np.float32), factors


def _border(lower: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """Return what a score must reach, at least, to be among the best [n]. lower: lower bounds of scores [n, w]."""
    if lower.shape[1] < top_k:
        return np.full(len(lower), -np.inf)
    border = np.partition(lower, -top_k, axis=1)[:, -top_k]
    # Beyond float32 all scores are equal.
    border = np.minimum(border, _LARGEST_SCORE * (1 - 2.0**-20))
    return np.where(border < -_LARGEST_SCORE * (1 - 2.0**-20), -np.inf, border)


class Pool:
    """Holds the true vectors of all candidates of some queries, each once. They come from memory where it has them; the
    others are read together."""

    def __init__(self, portions: Sequence[Portion], chosen: Sequence[Ids], read: Read) -> None:
        self._chosen = chosen
        self._numbers = np.unique(np.concatenate(chosen)) if len(chosen) > 1 else np.sort(chosen[0])
        self.ids = np.empty(len(self._numbers), np.int64)
        self.vectors = np.empty((len(self._numbers), portions[0].segment.dimension), np.float32)
        cuts = [*np.searchsorted(self._numbers, [portion.begin for portion in portions]).tolist(), len(self._numbers)]
        missing = np.ones(len(self._numbers), bool)
        for portion, low, high in zip(portions, cuts, cuts[1:], strict=False):
            rows = self._numbers[low:high] - portion.begin
            self.ids[low:high] = portion.segment.ids[rows]
            if isinstance(portion.segment, Flat):
                self.vectors[low:high] = portion.segment.vectors[rows]
                missing[low:high] = False
        # Candidates that do not exist any more.
        self.gone = self._read(np.flatnonzero(missing), read) if missing.any() else NO_IDS

    def _read(self, places: Ids, read: Read) -> Ids:
        places = places[np.argsort(self.ids[places])]
        wanted = self.ids[places]
        ids, vectors = read(wanted)
        if len(ids) < len(wanted):
            return np.setdiff1d(wanted, ids)
        self.vectors[places] = vectors
        return NO_IDS

    def members(self, query: int) -> tuple[Ids, Vectors]:
        """Return ids [m] and true vectors [m, d] of the candidates of a query."""
        places = np.searchsorted(self._numbers, self._chosen[query])
        return self.ids[places], self.vectors[places]
