"""The approximate segment of a big bank, with inverted lists (IVF): a search probes some of them. This file owns the
training, which is from the vectors of the bank itself, and the measured recall. What is in a list that is not probed is
not found; all else is as in the exact segments."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_service.search.faiss_gpu import GpuCopy, faiss, selector
from memory_service.search.gathering import Gathering, as_fp16
from memory_service.search.segments import HALF_STEP, Bits, Hits, Ids, Segment, as_bytes, check_total, fits

# FAISS asks for 39 vectors a centroid.
_PER_LIST = 39
_ROUNDS = 8
# Lists are probed until this share of the exact top 10 is found ...
_RECALL = 0.99
_RECALL_AT = 10
_SAMPLE = 256
_STEP = 32
# ... in at most this part of all lists: beyond, an exact index costs no more.
WORTH_PROBING = 0.25
# The lists that are probed hold so many times the rows that are asked for.
_SPARE = 4
# Where few rows count, their nearest ones are farther away: more lists are probed than their share alone would ask for.
_THIN = 1.25


class Ivf(Segment):
    """Keeps vectors as fp16, in lists by the nearest centroid. Ids ascend, and it does not grow."""

    kind = "ivf"

    def __init__(self, dimension: int, ids: Ids, centroids: NDArray[np.float32], sizes: Sequence[int]) -> None:
        """Make a segment with these centroids [lists, d] and `sizes`, the rows of each list, which the caller then puts
        into `lists`."""
        super().__init__(dimension, ids)
        quantizer = _quantizer(centroids)
        # FAISS's own memory, which a snapshot fills; as long as this lives.
        self.centroids = faiss.rev_swig_ptr(quantizer.get_xb(), centroids.size).reshape(centroids.shape)
        self.sizes = sizes
        # How many rows there were when the centroids were trained.
        self.trained = len(ids)
        self.probes = 1
        self.recall: float | None = None
        fp16, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        self._index = faiss.IndexIVFScalarQuantizer(quantizer, dimension, len(sizes), fp16, metric, False)
        self._index.is_trained = True
        self._index.ntotal = len(ids)
        self._gpu = GpuCopy(self._index)
        # Row numbers and codes, list by list: views of FAISS's memory, which is just as long as the list.
        self.lists = [self._list(number, size) for number, size in enumerate(sizes)]

    def _list(self, number: int, size: int) -> tuple[Ids, NDArray[np.float16]]:
        if not size:
            return np.empty(0, np.int64), np.empty((0, self.dimension), np.float16)
        inverted = self._index.invlists
        inverted.resize(number, size)
        codes = faiss.rev_swig_ptr(inverted.get_codes(number), size * self.dimension * 2)
        return faiss.rev_swig_ptr(inverted.get_ids(number), size), codes.view(np.float16).reshape(size, -1)

    def search(self, queries: NDArray[np.float32], width: int, bits: Bits | None, share: float) -> Hits:
        # More lists where few rows count, so that as many rows are looked at as without a filter.
        wanted = max(self.probes, _SPARE * width * len(self.sizes) / max(self.rows, 1)) / max(share, 1e-6) ** _THIN
        probes = min(len(self.sizes), int(np.ceil(wanted)))
        while True:
            scores, rows = self.probe(queries, width, bits, probes)
            if probes == len(self.sizes) or rows.min(initial=0) >= 0:
                return scores, rows
            probes = min(len(self.sizes), 4 * probes)

    def probe(self, queries: NDArray[np.float32], width: int, bits: Bits | None, probes: int) -> Hits:
        """Search so many of the lists; all else is as in `search`."""
        parameters = faiss.SearchParametersIVF(nprobe=probes, sel=selector(bits))
        found: Hits | None = self._gpu.search(queries, width, params=parameters) if bits is None else None
        return found or self._index.search(queries, width, params=parameters)

    @property
    def doubt(self) -> float:
        return self.error + (self.largest * HALF_STEP if self._gpu.in_use else 0)

    def pieces(self) -> Iterator[tuple[Ids, NDArray[Any]]]:
        yield from self.lists

    def parts(self) -> Iterator[memoryview]:
        yield as_bytes(self.ids)
        yield as_bytes(self.centroids)
        for rows, codes in self.lists:
            yield as_bytes(rows)
            yield as_bytes(codes)

    def header(self) -> dict[str, Any]:
        more = {"trained": self.trained, "probes": self.probes, "recall": self.recall, "sizes": list(self.sizes)}
        return super().header() | more

    def check(self) -> None:
        check_total(self._index.invlists.compute_ntotal(), self.rows)


class Stopped(Exception):
    """The error of work that is broken off because the service ends."""


def ivf(sources: Sequence[Segment], centroids: NDArray[np.float32] | None, stopping: Callable[[], bool]) -> Ivf | None:
    """Make one segment with lists of the living rows of others; None where their vectors do not fit into fp16.

    centroids: [lists, d], trained where there are none. A source that has these very centroids knows the lists of its
    rows. stopping: tells whether to break off. Errors: Stopped.
    """
    faiss.omp_set_num_threads(max(1, (os.cpu_count() or 1) // 4))
    gathering = Gathering(sources)
    if centroids is None:
        centroids = _train(gathering, stopping)
    lists = _assign(gathering, centroids, stopping)
    sizes = np.bincount(lists, minlength=len(centroids))
    made = Ivf(gathering.dimension, gathering.ids, centroids, sizes.tolist())
    made.largest = gathering.largest
    filled = np.zeros(len(sizes), np.int64)
    for piece in gathering.pieces():
        codes, error = as_fp16(piece)
        if not fits(error, made.largest):
            return None
        made.error = max(made.error, error)
        order = np.argsort(lists[piece.rows], kind="stable")
        numbers, begins = np.unique(lists[piece.rows][order], return_index=True)
        for number, part in zip(numbers.tolist(), np.split(order, begins[1:]), strict=True):
            place = slice(filled[number], filled[number] + len(part))
            made.lists[number][0][place] = piece.rows[part]
            made.lists[number][1][place] = codes[part]
            filled[number] += len(part)
    _tune(made, gathering.sample(min(_SAMPLE, len(gathering.ids))), stopping)
    return made


def _train(gathering: Gathering, stopping: Callable[[], bool]) -> NDArray[np.float32]:
    """Train centroids [lists, d], which have the length 1: lists are by direction."""
    total = len(gathering.ids)
    lists = max(1, min(round(4 * total**0.5), total // _PER_LIST))
    sample = gathering.sample(min(total, lists * _PER_LIST))
    norms = np.sqrt(np.einsum("nd,nd->n", sample, sample, dtype=np.float64)).astype(np.float32)[:, None]
    sample /= np.where(norms > 0, norms, 1)
    centroids: NDArray[np.float32] | None = None
    # Round by round, so that the end of the service does not wait for all of them.
    for _ in range(_ROUNDS):
        _go_on(stopping)
        means = faiss.Kmeans(sample.shape[1], lists, niter=1, spherical=True, seed=1, max_points_per_centroid=1 << 30)
        means.train(sample, init_centroids=centroids)
        centroids = means.centroids
    assert centroids is not None
    return centroids


def _assign(gathering: Gathering, centroids: NDArray[np.float32], stopping: Callable[[], bool]) -> NDArray[np.int32]:
    """Return the list of each row [n]."""
    quantizer = _quantizer(centroids)
    lists = np.empty(len(gathering.ids), np.int32)
    for piece in gathering.pieces():
        if isinstance(piece.source, Ivf) and piece.source.centroids is centroids:
            lists[piece.rows] = piece.number
        elif len(piece.rows):
            _go_on(stopping)
            lists[piece.rows] = quantizer.search(piece.vectors.astype(np.float32), 1)[1][:, 0]
    return lists


def _tune(made: Ivf, queries: NDArray[np.float32], stopping: Callable[[], bool]) -> None:
    """Set how many lists are probed: as many as the wanted recall takes. queries: vectors [n, d] of the bank; a query
    does not count where it finds itself."""
    width = min(_RECALL_AT + 1, made.rows)
    exact = np.empty((len(queries), width - 1), np.int64)
    for begin in range(0, len(queries), _STEP):
        _go_on(stopping)
        some = slice(begin, begin + _STEP)
        exact[some] = made.probe(queries[some], width, None, len(made.sizes))[1][:, 1:]
    while True:
        _go_on(stopping)
        found = made.probe(queries, width, None, made.probes)[1]
        hits = sum(len(np.intersect1d(some, other)) for some, other in zip(found, exact, strict=True))
        made.recall = hits / exact.size if exact.size else 1.0
        if made.recall >= _RECALL or made.probes >= len(made.sizes):
            return
        made.probes = min(2 * made.probes, len(made.sizes))


def _quantizer(centroids: NDArray[np.float32]) -> Any:
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    return index


def _go_on(stopping: Callable[[], bool]) -> None:
    if stopping():
        raise Stopped
