"""The course of a training: its steps one after the other, with what the streams remember in between."""

from collections.abc import Mapping
from typing import Any

import torch

from model_worker.attachment.model_parts import device_of
from model_worker.train.memlong.choosing import Shares
from model_worker.train.memlong.forward import KeyValue
from model_worker.train.memlong.learner import Learner, Step
from model_worker.train.memlong.remembering import Remembering
from model_worker.train.memlong.streams import Piece, Streams

_AT_ONCE = 256  # chunks that are encoded in one forward


class Course:
    """The steps of `streams` for a learner. alone: whether chunks are encoded alone. sinks: first tokens that stay."""

    def __init__(
        self, streams: Streams, remembering: Remembering, shares: Shares, learner: Learner, *, alone: bool, sinks: int
    ):
        self.streams, self.remembering, self._shares, self._learner = streams, remembering, shares, learner
        self._alone, self._sinks = alone, sinks
        self._pieces: list[Piece] = []
        self.tokens = 0  # of texts, so far

    def step(self) -> Step:
        """Return the next step. Streams that come to the middle of a document remember what stands before it."""
        remembering, device = self.remembering, device_of(self._learner)
        pieces = self._pieces = self.streams.pieces()
        remembering.enter(pieces)
        for stream, piece in enumerate(pieces):
            if piece.entered and piece.begin and self._alone:
                for chunks in torch.split(remembering.earlier(piece), _AT_ONCE):
                    with torch.no_grad():
                        remembering.add(stream, chunks, self._learner.encode(chunks.to(device)))
        chosen = remembering.choose(pieces, self._shares, self.streams.rng, device)
        rows = remembering.rows(pieces, self._sinks, device)
        self.tokens += sum(piece.count for piece in pieces) * self.streams.size
        own = rows.ids.reshape(-1, self.streams.size) if self._alone else None
        return Step(rows, chosen, remembering.pool.kv, own)

    def keep(self, kv: Mapping[int, KeyValue]) -> None:
        """Remember the chunks of the last step. kv: by memory layer, `[N, Hkv, S, D]`."""
        self.remembering.keep_step(self._pieces, kv)

    def state(self) -> dict[str, Any]:
        """Return where the streams are and what they remember."""
        return {"streams": self.streams.state(), "pool": self.remembering.pool.state(), "tokens": self.tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a course with the same settings and texts."""
        self.streams.restore(state["streams"])
        self.remembering.pool.restore(state["pool"])
        self.tokens = state["tokens"]
