"""Rows of drills become steps of the training: all blocks of a row attend to the row's own chunks."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_worker.attachment.model_parts import device_of
from model_worker.train.drills import Drill, DrillRow
from model_worker.train.memlong.learner import Learner, Step
from model_worker.train.memlong.remembering import Chosen
from model_worker.train.memlong.rows import Rows
from model_worker.train.memlong.streams import UNSCORED

WEIGHT = 0.5  # of the loss of a step of drills beside that of the texts


class Drilling:
    """Gives `count` rows of drills for each update, by turns of the drills.

    alone: whether chunks are encoded alone; else those of a row follow each other in a window. sinks: first tokens of a
    row that stay.
    """

    def __init__(self, drills: Sequence[Drill], learner: Learner, count: int, *, alone: bool, sinks: int):
        self.drills, self._learner, self._count = drills, learner, count
        self._alone, self._sinks = alone, sinks
        self.turn = 0

    def steps(self) -> list[Step]:
        """Return the steps of the next update: none where there are no rows."""
        if not self._count:
            return []
        drill = self.drills[self.turn % len(self.drills)]
        self.turn += 1
        return [self._step([drill.row() for _ in range(self._count)])]

    def _step(self, drawn: Sequence[DrillRow]) -> Step:
        device = device_of(self._learner)
        ids = torch.from_numpy(np.stack([row.ids for row in drawn])).to(device)
        wanted = torch.from_numpy(np.stack([row.wanted for row in drawn])).to(device)
        chunks = torch.from_numpy(np.stack([row.chunks for row in drawn])).to(device)
        labels = torch.full_like(ids, UNSCORED)
        labels[:, :-1] = ids[:, 1:].masked_fill(~wanted[:, 1:], UNSCORED)
        rows = Rows(ids, labels, torch.zeros(len(ids), dtype=torch.long, device=device), ids[:, : self._sinks])
        chosen = _chosen(*chunks.shape, blocks=ids.shape[1] // chunks.shape[2], device=device)
        if self._alone:
            return Step(rows, chosen, {}, chunks.flatten(0, 1), WEIGHT)
        stored = Chosen(chosen.places, chosen.offsets, chosen.own, chunks.shape[0] * chunks.shape[1])
        return Step(rows, stored, self._in_window(chunks), None, WEIGHT)

    @torch.no_grad()
    def _in_window(self, chunks: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the K-V of chunks `[B, K, S]` that follow each other, by memory layer, `[B * K, Hkv, S, D]`."""
        ids = chunks.flatten(1)
        begins = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        rows = Rows(ids, torch.full_like(ids, UNSCORED), begins, ids[:, : self._sinks])
        return self._learner.nats(Step(rows, None, {}))[1]

    def state(self) -> dict[str, Any]:
        """Return what the drills go on from, as plain values."""
        return {"turn": self.turn, "draws": json.dumps([drill.draw.getstate() for drill in self.drills])}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of the same drills."""
        self.turn = state["turn"]
        for drill, (version, numbers, following) in zip(self.drills, json.loads(state["draws"]), strict=True):
            drill.draw.setstate((version, tuple(numbers), following))


def _chosen(rows: int, count: int, size: int, *, blocks: int, device: torch.device) -> Chosen:
    """Return places by which all blocks of a row attend to its `count` chunks, which stand before it."""
    places = torch.arange(rows * count, device=device).view(rows, 1, count).expand(-1, blocks, -1)
    offsets = (torch.arange(count, device=device) - count).mul(size).expand(rows * blocks, -1)
    own = torch.zeros_like(offsets, dtype=torch.bool)
    return Chosen(places.reshape(-1, count), offsets, own, 0)
