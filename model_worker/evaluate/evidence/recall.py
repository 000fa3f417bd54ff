"""Recall at k is the share of questions for which evidence is among the k passages that score best.

A question counts as found when one of its passages is, so that more evidence makes a question easier; the row `chance`
says how often k passages drawn at random would have one. An embedder scores by the inner product of all vectors, as a
bank does; a question in which it sees nothing finds nothing, and neither does BM25 in passages that share no word.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_worker.embed import Embedder, embedded, embedded_queries
from model_worker.embed.base import Vectors
from model_worker.errors import InputError
from model_worker.evaluate.evidence.bm25 import Bm25
from model_worker.evaluate.evidence.collection import Collection, Question
from model_worker.evaluate.interval import Share

Progress = Callable[[str, int, int], None]
_BATCH = 32


@dataclass(frozen=True, slots=True)
class Recall:
    """How many questions of a kind were found among the best k passages by one way of searching.

    found: questions; for `chance` the expected number. low, high: Wilson's 95 % interval of the share over questions.
    """

    way: str
    kind: str
    k: int
    asked: int
    found: float
    low: float
    high: float

    @property
    def share(self) -> float:
        """Return the share of the questions that were found."""
        return self.found / self.asked


@dataclass(frozen=True, slots=True)
class Cost:
    """What a way of searching cost for so many texts, passages and questions together.

    seconds: by the clock. cpu_seconds: of this process. dimension: numbers of a vector, 0 without vectors.
    """

    way: str
    texts: int
    seconds: float
    cpu_seconds: float
    dimension: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of all ways of searching, and what each cost."""

    rows: list[Recall]
    costs: list[Cost]


def measure_recall(
    collections: Sequence[Collection],
    embedders: Mapping[str, Embedder],
    ks: Sequence[int],
    progress: Progress = lambda stage, done, total: None,
) -> Measured:
    """Measure each embedder, by its name, and BM25 and chance beside them.

    progress: called with (name of the embedder, texts done, texts in all). Raises InputError where nothing is asked.
    """
    collections = [each for each in collections if each.questions]
    if not collections:
        raise InputError("there is no question whose evidence is known")
    found = Measured([], [])
    for name, embedder in embedders.items():
        begin = _clocks()
        ranks, texts = _ranks_by_vectors(collections, embedder, partial(progress, name))
        found.costs.append(_cost(name, texts, begin, embedder.dimension))
        found.rows.extend(_counted(name, ranks, ks))
    begin = _clocks()
    texts = sum(len(each.passages) + len(each.questions) for each in collections)
    ranks = list(_ranks_by_words(collections))
    found.costs.append(_cost("bm25", texts, begin, 0))
    found.rows.extend([*_counted("bm25", ranks, ks), *_by_chance(collections, ks)])
    return found


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _cost(way: str, texts: int, begin: tuple[float, float], dimension: int) -> Cost:
    seconds, cpu = (now - then for now, then in zip(_clocks(), begin, strict=True))
    return Cost(way, texts, seconds, cpu, dimension)


def _ranks_by_vectors(
    collections: Sequence[Collection], embedder: Embedder, progress: Callable[[int, int], None]
) -> tuple[list[tuple[str, float]], int]:
    """Return (kind, rank of the first evidence) of each question, and the number of texts that were embedded."""
    passages = dict.fromkeys(passage for each in collections for passage in each.passages)
    queries = dict.fromkeys(question.text for each in collections for question in each.questions)
    total = len(passages) + len(queries)
    rows = _rows(list(passages), partial(embedded, embedder), lambda done: progress(done, total))
    asked = _rows(
        list(queries), partial(embedded_queries, embedder), lambda done: progress(len(passages) + done, total)
    )
    at, asked_at = ({text: place for place, text in enumerate(texts)} for texts in (passages, queries))
    ranks = []
    for each in collections:
        stored = rows[[at[passage] for passage in each.passages]]
        for question in each.questions:
            query = asked[asked_at[question.text]]
            ranks.append((question.kind, _first(stored @ query, question) if query.any() else math.inf))
    return ranks, total


def _rows(texts: Sequence[str], embed: Callable[[list[str]], Vectors], progress: Callable[[int], None]) -> Vectors:
    """Return the rows of texts, embedded in batches of texts of similar length, which need little padding."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    parts = []
    for begin in range(0, len(order), _BATCH):
        parts.append(embed([texts[place] for place in order[begin : begin + _BATCH]]))
        progress(min(begin + _BATCH, len(order)))
    rows = np.concatenate(parts)
    return rows[np.argsort(order)]


def _ranks_by_words(collections: Sequence[Collection]) -> Iterator[tuple[str, float]]:
    """Yield (kind, rank of the first evidence) of each question by BM25; passages without a shared word have none."""
    for each in collections:
        index = Bm25(each.passages)
        for question in each.questions:
            scores = index.scores(question.text)
            seen = any(scores[place] > 0 for place in question.evidence)
            yield question.kind, _first(scores, question) if seen else math.inf


def _first(scores: NDArray[Any], question: Question) -> float:
    """Return the rank, from 1, of the evidence with the best score; equal scores rank in the order of the passages."""
    order = np.argsort(-scores, kind="stable")
    return float(np.flatnonzero(np.isin(order, list(question.evidence)))[0] + 1)


def _counted(way: str, ranks: Sequence[tuple[str, float]], ks: Sequence[int]) -> Iterator[Recall]:
    for kind in dict.fromkeys(kind for kind, _ in ranks):
        own = [rank for each, rank in ranks if each == kind]
        for k in ks:
            found = Share(sum(rank <= k for rank in own), len(own))
            yield Recall(way, kind, k, found.asked, found.right, found.low, found.high)


def _by_chance(collections: Sequence[Collection], ks: Sequence[int]) -> Iterator[Recall]:
    """Yield what passages in random order would find: 1 - C(n - m, k) / C(n, k), of n passages m with evidence."""
    pairs = [(question, len(each.passages)) for each in collections for question in each.questions]
    for kind in dict.fromkeys(question.kind for question, _ in pairs):
        own = [(len(question.evidence), total) for question, total in pairs if question.kind == kind]
        for k in ks:
            found = sum(1 - math.comb(n - m, min(k, n)) / math.comb(n, min(k, n)) for m, n in own)
            yield Recall("chance", kind, k, len(own), found, found / len(own), found / len(own))
