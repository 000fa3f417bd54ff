"""The smallest set of layers that keeps most of the recall of all is chosen here: searched for, counted, counted anew.

The search takes layer after layer away, guided by the log-probability of the answers to a few facts, which is much less
noisy than counts of right answers. Counts on facts that the search did not see choose among the sets that it found;
counts on facts that the choice did not see are what is reported.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from model_worker.attachment.attachment import Attachment
from model_worker.errors import InputError
from model_worker.evaluate.cost import Cost, counted
from model_worker.evaluate.interval import Interval, Share, interval
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.layer_search import LayerSet, eliminate
from model_worker.evaluate.planted import Planting, plant
from model_worker.evaluate.recall_by_layers import RecallByLayers, Told, with_layers
from model_worker.user_text import encode_text, readable

# The search ends where so much less is told than what is to be kept, both as shares of what all layers tell.
_HOPELESS = 0.2
_STEP = 0.85  # from one size of a set that is counted to the next
_STAGES = ("search", "choice", "confirmation")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """How layers are chosen.

    planting: the facts. context: how chunks are stored, `isolated` or `window`. hits: chunks that each question
    recalls. keep: the share of the recall of all layers that is to be kept. facts: of the search. fresh: facts of each
    of the two counts. minutes: after which the search ends with what it has; None: never.
    """

    planting: Planting
    context: str
    hits: int
    keep: float = 0.95
    facts: int = 16
    fresh: int = 48
    minutes: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Counted:
    """A set of layers and what it tells of some facts.

    kept: its right answers as a share of those of all layers, with the paired interval. stored: bytes of K-V a token.
    """

    layers: LayerSet
    told: Share
    kept: Interval
    stored: int

    def document(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        kept = {"share": self.kept.mean, "low": self.kept.low, "high": self.kept.high}
        return {"layers": list(self.layers), "bytes_per_token": self.stored, "told": self.told.document(), "kept": kept}


@dataclass(frozen=True, slots=True)
class LayersChosen:
    """What was chosen, and how.

    chosen, every: the chosen set and all layers, counted on facts that had no part in the choice. frontier: sets of the
    search from all layers downwards, counted on the facts of the choice. nats: mean loss of an answer, by each set that
    the search tried. spent: whether the search was ended by its time.
    """

    keep: float
    chosen: Counted
    every: Counted
    frontier: list[Counted]
    nats: dict[LayerSet, float]
    spent: bool
    cost: Cost

    def document(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "keep": self.keep,
            "chosen": self.chosen.document(),
            "all": self.every.document(),
            "frontier": [own.document() for own in self.frontier],
            "tried": [{"layers": list(layers), "nats": nats} for layers, nats in self.nats.items()],
            "ended_by_time": self.spent,
            "cost": asdict(self.cost),
        }


def choose_layers(
    attachment: Attachment, text: str, plan: ChoicePlan, *, journal: Journal, progress: Progress | None = None
) -> LayersChosen:
    """Choose among the retrieval layers of an attachment, by facts planted in pieces of `text`.

    journal: has what was scored and counted before, and gets what is scored and counted now. progress: called with
    (stage, done, in all). Raises InputError for a text that is too short, and where all layers together tell nothing.
    """
    return _Choice(attachment, text, plan, journal, progress or (lambda stage, done, total: None)).made()


def bytes_per_token(attachment: Attachment, layers: LayerSet) -> int:
    """Return the bytes of K-V that a token takes with memory in these retrieval layers, as the model computes them."""
    stored = with_layers(attachment.plan, layers).memory_layers
    size = next(attachment.model.parameters()).element_size()
    return 2 * len(stored) * attachment.kv_heads * attachment.head_dim * size


class _Spent(Exception):
    """The time of the search is over."""


class _Choice:
    """One choice under way."""

    def __init__(self, attachment: Attachment, text: str, plan: ChoicePlan, journal: Journal, progress: Progress):
        self._attachment, self._plan, self._journal, self._progress = attachment, plan, journal, progress
        self._all: LayerSet = attachment.plan.retrieval_layers
        self._ids = encode_text(attachment.tokenizer, readable(text))
        self._facts: dict[str, RecallByLayers] = {}
        self._nats: dict[LayerSet, float] = {}
        self._right: dict[LayerSet, float] = {}
        self._end = None if plan.minutes is None else time.monotonic() + 60 * plan.minutes
        self._spent, self._cost = False, Cost(**(journal.get("cost") or {}))

    def made(self) -> LayersChosen:
        """Search, count, and count anew."""
        frontier = self._frontier(list(self._path()))
        every = self._counted("confirmation", self._all)
        chosen = every
        for own in sorted(filter(self._keeps, frontier), key=lambda counted: len(counted.layers)):
            chosen = self._counted("confirmation", own.layers)
            if self._keeps(chosen):
                break
        return LayersChosen(self._plan.keep, chosen, every, frontier, self._nats, self._spent, self._cost)

    # -- search ---------------------------------------------------------------------------------------------------

    def _path(self) -> Iterator[LayerSet]:
        """Yield sets from all layers downwards, until too little is told or the time is over."""
        try:
            for found in eliminate(self._all, lambda layers: -self._loss(layers)):
                told, best = self._right[found.layers], self._right[self._all]
                if not best:
                    raise InputError(
                        f"with memory in all layers the model tells 0 of {self._plan.facts} facts: there is no recall "
                        "that fewer layers could keep; try another wording, a shorter chunk or fewer hits"
                    )
                if told < (self._plan.keep - _HOPELESS) * best:
                    return
                yield found.layers
        except _Spent:
            self._spent = True

    def _loss(self, layers: LayerSet) -> float:
        """Return the mean loss of the answers with memory in these layers, in nats. Raises _Spent."""
        key = f"search {_words(layers)}"
        found = self._journal.get(key)
        if found is None:
            if self._end is not None and self._nats and time.monotonic() > self._end:
                raise _Spent
            told = self._tell("search", layers)
            found = {"nats": float(told.nats.mean()), "right": float(told.right.double().mean())}
            self._journal.put(key, found)
        self._nats[layers], self._right[layers] = found["nats"], found["right"]
        self._progress("sets of layers", len(self._nats), max(3 * len(self._all), len(self._nats)))
        return float(found["nats"])

    # -- counts ---------------------------------------------------------------------------------------------------

    def _frontier(self, path: Sequence[LayerSet]) -> list[Counted]:
        """Count sets of the path: some of all sizes, and every size just below the smallest of these that keeps enough.

        path: from all layers downwards.
        """
        some = _spread(len(path))
        counted = {}
        for done, index in enumerate(some, 1):
            counted[index] = self._counted("choice", path[index])
            self._progress("sets counted", done, len(some))
        smallest = max((index for index in some if self._keeps(counted[index])), default=0)
        for index in range(smallest + 1, min((i for i in some if i > smallest), default=0)):
            counted[index] = self._counted("choice", path[index])
        return [counted[index] for index in sorted(counted)]

    def _keeps(self, counted: Counted) -> bool:
        return counted.kept.mean >= self._plan.keep

    def _counted(self, stage: str, layers: LayerSet) -> Counted:
        right, best = self._told(stage, layers), self._told(stage, self._all)
        share = Share(int(right.sum()), len(right))
        return Counted(layers, share, _kept(right, best), bytes_per_token(self._attachment, layers))

    def _told(self, stage: str, layers: LayerSet) -> Tensor:
        """Return which fresh facts are told with memory in these layers, `[fresh]`, 0 or 1."""
        key = f"{stage} {_words(layers)}"
        found = self._journal.get(key)
        if found is None:
            found = self._tell(stage, layers).right.int().tolist()
            self._journal.put(key, found)
        return torch.tensor(found, dtype=torch.double)

    def _tell(self, stage: str, layers: LayerSet) -> Told:
        """Ask for the facts of a stage with memory in these layers, and count what that costs."""
        with counted(self._attachment.model, self._cost):
            told = self._asked(stage).told(layers)
        self._journal.put("cost", asdict(self._cost))
        return told

    def _asked(self, stage: str) -> RecallByLayers:
        """Return the facts of a stage, made when they are first asked for; no two stages share a fact."""
        if stage not in self._facts:
            plan, seed = self._plan, len(_STAGES) * self._plan.seed + _STAGES.index(stage)
            count = plan.facts if stage == "search" else plan.fresh
            facts = plant(self._attachment.tokenizer, self._ids, plan.planting, count, seed)
            self._facts = {  # those of earlier stages are not needed any more, and take memory
                stage: RecallByLayers(
                    self._attachment, facts, self._ids, context=plan.context, hits=plan.hits, seed=seed
                )
            }
        return self._facts[stage]


def _words(layers: LayerSet) -> str:
    return " ".join(map(str, layers))


def _spread(count: int) -> list[int]:
    """Return some of the indices from 0 to count - 1: sizes from `count` down, each about 0.85 of the one before."""
    sizes = {count}
    while (smallest := min(sizes)) > 1:
        sizes.add(min(math.floor(_STEP * smallest), smallest - 1))
    return sorted(count - size for size in sizes if size)


def _kept(right: Tensor, best: Tensor) -> Interval:
    """Return the ratio of two counts of right answers to the same facts, and its 95 % interval (delta method).

    right, best: `[N]`, 0 or 1. The ratio is 0 where all layers tell nothing.
    """
    total = float(best.sum())
    if not total:
        return Interval(0.0, math.inf)
    ratio = float(right.sum()) / total
    return Interval(ratio, interval(right - ratio * best).width * len(best) / total)
