"""What a memory is worth on texts that are not trained on: losses without memory, with it, and with another text's.

A text is read in rows; each row begins a window before the tokens that it scores, so that these see a whole window. The
query is the past. Differences are paired, token by token. Where chunks are encoded in their window, those at the
beginning of a row have a shorter one before them than in use.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_worker.attachment.model_parts import device_of, evaluating
from model_worker.errors import InputError
from model_worker.evaluate.gains import gains, part
from model_worker.evaluate.perplexity import NONE, OTHER
from model_worker.train.memlong.choosing import Shares
from model_worker.train.memlong.learner import Learner, Step
from model_worker.train.memlong.pool import Pool
from model_worker.train.memlong.remembering import Remembering
from model_worker.train.memlong.streams import UNSCORED, Piece, piece_of

MEMORY = "memory"
_SHARES = {NONE: Shares(0, 1, 0, 0), MEMORY: Shares(0, 0, 0, 0), OTHER: Shares(0, 0, 1, 0)}
_SEED = 1
Show = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A measurement of held-out texts.

    remembering: how memory is chosen from these texts. blocks: that are scored of each. row: blocks of a row. alone,
    sinks: as in training.
    """

    remembering: Remembering
    blocks: int
    row: int
    alone: bool
    sinks: int

    def check(self) -> None:
        """Raise InputError for a text without a block behind a window and a chunk that has left it."""
        documents, size = self.remembering.documents, self.remembering.blocks.size
        least = self.remembering.blocks.before + 2
        for index in range(len(documents)):
            if len(documents.ids(index)) // size < least:
                raise InputError(f"{documents.name(index)} is too short to be held out: {least * size} tokens at least")

    def measure(self, learner: Learner, show: Show = lambda done, total: None) -> list[dict[str, Any]]:
        """Return a row for each memory: its loss in nats a token and its gain over none with 95 % intervals.

        show: called with (texts done, in all).
        """
        documents, parts = self.remembering.documents, []
        with evaluating(learner), torch.no_grad():
            for index in range(len(documents)):
                losses = self._losses(learner, index)
                parts.append(part(documents.name(index), 0, losses, [], 0))
                show(index + 1, len(documents))
        return gains(parts)

    def _losses(self, learner: Learner, index: int) -> dict[str, Tensor]:
        """Return the losses of the scored tokens of one text for each memory."""
        ids, size = self.remembering.documents.ids(index), self.remembering.blocks.size
        chunks, before, most = len(ids) // size, self.remembering.blocks.before, self.remembering.pool.size
        first = max(before + 1, min(chunks - self.blocks, most + before))
        remembering = replace(self.remembering, pool=Pool(2, most, self.remembering.embedder.dimension))
        self._read(learner, remembering, 0, index, max(0, first - before - most), first - before)
        other = (index + 1) % len(self.remembering.documents)
        if other != index:
            self._read(learner, remembering, 1, other, 0, most)
        kinds = [kind for kind in _SHARES if kind != OTHER or other != index]
        found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        stop = min(chunks, first + self.blocks)
        for at in range(first, stop, self.row):
            count = min(self.row, stop - at)
            piece = piece_of(ids, index, at - before, before + count, size, False)
            for kind in kinds:
                step = self._step(learner, remembering, piece, _SHARES[kind], before)
                nats, kv = learner.nats(step)
                found[kind].append(nats[step.rows.labels != UNSCORED].double().cpu())
                if kind == MEMORY:  # what a chunk is in its window depends on what its window attended to
                    own = kv
            remembering.keep_step([replace(piece, count=count)], own)
        return {kind: torch.cat(rows) for kind, rows in found.items()}

    def _step(self, learner: Learner, remembering: Remembering, piece: Piece, shares: Shares, unscored: int) -> Step:
        """Return the step of a row whose first `unscored` blocks are not scored."""
        device = device_of(learner)
        chosen = remembering.choose([piece], shares, np.random.default_rng(_SEED), device)
        rows = remembering.rows([piece], self.sinks, device)
        labels = rows.labels.clone()
        labels[:, : unscored * remembering.blocks.size] = UNSCORED
        chunks = rows.ids.reshape(-1, remembering.blocks.size) if self.alone else None
        return Step(replace(rows, labels=labels), chosen, remembering.pool.kv, chunks)

    def _read(self, learner: Learner, remembering: Remembering, stream: int, index: int, begin: int, stop: int) -> None:
        """Remember the chunks `begin` to `stop` of a text as a stream, without recalling anything meanwhile."""
        ids, size = remembering.documents.ids(index), remembering.blocks.size
        device = device_of(learner)
        for at in range(begin, min(stop, len(ids) // size), self.row):
            count = min(self.row, stop - at, len(ids) // size - at)
            piece = piece_of(ids, index, at, count, size, False)
            chunks = torch.from_numpy(piece.ids.astype(np.int64)).view(-1, size)
            if self.alone:
                kv = learner.encode(chunks.to(device))
            else:
                rows = remembering.rows([piece], self.sinks, device)
                kv = learner.nats(Step(rows, None, {}))[1]
            remembering.add(stream, chunks, kv)


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say whether the memory is a gain: it is one only where the whole interval over blocks lies above zero."""
    row = next(row for row in rows if row["memory"] == MEMORY)
    width = row["width_blocks"]
    if width is None:
        return "the memory's gain has no interval, since there is a single group of blocks: no gain is claimed"
    said = f"{row['gain']:+.4f} nats a token [{row['gain'] - width:+.4f}, {row['gain'] + width:+.4f}]"
    if row["gain"] - width > 0:
        return f"the memory gains {said}"
    if row["gain"] + width < 0:
        return f"the memory harms: {said}"
    return f"no gain is shown: {said}"
