"""Streams read documents in order, side by side: each walks through one, and draws the next when it is through."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from model_worker.train.memlong.documents import Documents, Ids

UNSCORED = -100


@dataclass(frozen=True, slots=True)
class Piece:
    """What a stream reads in one step: chunks `begin` to `begin + count` of a document.

    ids: `[blocks * S]`, zeros behind the last chunk. labels: the token that follows each, or `UNSCORED`. entered:
    whether the stream has come to the document with this step. first: what the stream has read in the place of the
    document's first token; None for that token.
    """

    document: int
    begin: int
    count: int
    ids: Ids
    labels: Ids
    entered: bool
    first: int | None = None


def piece_of(document: Ids, number: int, begin: int, blocks: int, size: int, entered: bool) -> Piece:
    """Return chunks of a document from `begin` on, at most `blocks` of `size` tokens each.

    number: of the document. A last chunk that is shorter than `size` is not read.
    """
    count = min(blocks, len(document) // size - begin)
    first, stop = begin * size, (begin + count) * size
    ids, labels = np.zeros(blocks * size, np.int64), np.full(blocks * size, UNSCORED, np.int64)
    ids[: stop - first] = document[first:stop]
    following = document[first + 1 : stop + 1]
    labels[: len(following)] = following
    return Piece(number, begin, count, ids.astype(np.int32), labels.astype(np.int32), entered)


@dataclass(slots=True)
class _Walk:
    """Where a stream is: in which document, at which chunk, how many steps it stays (none: to the end), and what it has
    read in the place of the document's first token (none: that token)."""

    document: int = -1
    at: int = 0
    left: int | None = 0
    first: int | None = None


class Streams:
    """Some streams over documents, in steps of `blocks` chunks of `size` tokens each; every step of a stream goes on.

    A document is drawn by its length. visit: steps that a stream stays in it, from a chunk that is drawn on; 0: from
    its first chunk to its last. begin: the token that a tokenizer puts in front of a text, if it does; where a stream
    comes to a document, every second time on average, it stands in the place of the first token, so that a model can
    begin with it and without. rng: of all that is drawn, here and by those who choose memory.
    """

    def __init__(
        self, documents: Documents, count: int, blocks: int, size: int, visit: int, seed: int, begin: int | None = None
    ):
        self.documents, self.blocks, self.size = documents, blocks, size
        self._visit, self._begin = visit, begin
        self._walks = [_Walk() for _ in range(count)]
        self.rng = np.random.default_rng(seed % (1 << 63))
        letters = np.array(documents.letters, dtype=float)
        self._ends = np.cumsum(letters / letters.sum())

    def __len__(self) -> int:
        return len(self._walks)

    def pieces(self) -> list[Piece]:
        """Return what each stream reads in the next step."""
        return [self._piece(walk) for walk in self._walks]

    def _piece(self, walk: _Walk) -> Piece:
        entered = walk.left == 0 or walk.at >= len(self.documents.ids(walk.document)) // self.size
        if entered:
            self._enter(walk)
        ids = self.documents.ids(walk.document)
        piece = piece_of(ids, walk.document, walk.at, self.blocks, self.size, entered)
        if entered:
            drawn = self._begin if self._begin is not None and self.rng.random() < 0.5 else None
            piece.ids[0] = piece.ids[0] if drawn is None else drawn
            walk.first = drawn if walk.at == 0 else None
        piece = replace(piece, first=walk.first)
        walk.at += piece.count
        walk.left = None if walk.left is None else walk.left - 1
        return piece

    def _enter(self, walk: _Walk) -> None:
        """Draw the next document of a stream, and where the stream enters it."""
        drawn = int(np.searchsorted(self._ends, self.rng.random(), side="right"))
        walk.document = min(drawn, len(self.documents) - 1)
        chunks = len(self.documents.ids(walk.document)) // self.size
        walk.at = int(self.rng.integers(0, max(1, chunks - self.blocks + 1))) if self._visit else 0
        walk.left = self._visit or None

    def state(self) -> dict[str, Any]:
        """Return where the streams are, as plain values."""
        return {"walks": [asdict(walk) for walk in self._walks], "rng": json.dumps(self.rng.bit_generator.state)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where a `state` was."""
        self._walks = [_Walk(**walk) for walk in state["walks"]]
        self.rng.bit_generator.state = json.loads(state["rng"])
