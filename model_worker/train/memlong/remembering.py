"""From what streams read to what their blocks attend to: chunks are embedded, chosen, and put into the pool."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_worker.embed.base import Embedder, embedded, embedded_queries
from model_worker.train.memlong.choosing import Search, Shares, Vector, choose, padded
from model_worker.train.memlong.documents import Documents
from model_worker.train.memlong.forward import KeyValue
from model_worker.train.memlong.pool import Numbers, Pool
from model_worker.train.memlong.rows import Blocks, Rows
from model_worker.train.memlong.streams import Piece


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the blocks of a step attend to, before the K-V are there; each field is that of `BlockMemory`."""

    places: Tensor
    offsets: Tensor
    own: Tensor
    pooled: int


@dataclass
class Remembering:
    """Chooses memory for the steps of some streams, whose chunks are in `pool`.

    query_tokens: past tokens of a query. keep: whether a stream keeps its memory from one document to the next.
    """

    documents: Documents
    tokenizer: Any
    embedder: Embedder
    blocks: Blocks
    search: Search
    query_tokens: int
    pool: Pool
    keep: bool = False
    _vectors: dict[int, Vector] = field(default_factory=dict)  # by stream, of the step's chunks

    def enter(self, pieces: Sequence[Piece]) -> None:
        """Begin another document where streams have come to one, without their memory unless it is kept."""
        for stream, piece in enumerate(pieces):
            if piece.entered:
                self.pool.begin(stream, self.keep)

    def earlier(self, piece: Piece) -> Tensor:
        """Return the chunks `[n, S]` of a piece's document before it, as many as the pool has room for."""
        size = self.blocks.size
        begin = max(0, piece.begin - self.pool.size)
        return _chunks(self.documents.ids(piece.document)[begin * size : piece.begin * size], size)

    def add(self, stream: int, chunks: Tensor, kv: Mapping[int, KeyValue]) -> None:
        """Remember chunks `[n, S]` of a stream. kv: by memory layer, `[n, Hkv, S, D]`."""
        self.pool.add(stream, kv, self._embedded(chunks.tolist()))

    def rows(self, pieces: Sequence[Piece], sinks: int, device: torch.device) -> Rows:
        """Return the rows of a step. sinks: how many of the first tokens that a stream has read of a document stay."""
        first = [self.documents.ids(piece.document)[:sinks].copy() for piece in pieces]
        for ids, piece in zip(first, pieces, strict=True):
            ids[:1] = ids[:1] if piece.first is None else piece.first
        return Rows(
            _tensor([piece.ids for piece in pieces], device),
            _tensor([piece.labels for piece in pieces], device),
            torch.tensor([piece.begin * self.blocks.size for piece in pieces], device=device),
            _tensor(first, device),
        )

    def choose(self, pieces: Sequence[Piece], shares: Shares, rng: np.random.Generator, device: torch.device) -> Chosen:
        """Return what each block of a step attends to; what is chosen follows from `rng`."""
        size, blocks = self.blocks.size, len(pieces[0].ids) // self.blocks.size
        tables: list[list[Numbers]] = [[], [], []]
        for stream, piece in enumerate(pieces):
            self._vectors[stream] = self._embedded(_chunks(piece.ids, size)[: piece.count].tolist())
            for block in range(blocks):
                kind = shares.draw(rng)
                found = self._block(kind, stream, pieces, block, rng) if block < piece.count else _nothing()
                for table, part in zip(tables, found, strict=True):
                    table.append(part)
        places, offsets, own = (padded(table, self.search.most) for table in tables)
        there = places >= 0
        parts = places, np.where(there, offsets, 0), there & (own > 0)
        at, begin, ours = (torch.from_numpy(part).to(device) for part in parts)
        return Chosen(at, begin, ours, self.pool.room)

    def _block(
        self, kind: str, stream: int, pieces: Sequence[Piece], block: int, rng: np.random.Generator
    ) -> tuple[Numbers, Numbers, Numbers]:
        """Return places, offsets and whether they are of the row's document (1 or 0) of what one block attends to."""
        if kind == "other":
            return self._other(stream, pieces[stream], block, rng)
        piece, pool, size = pieces[stream], self.pool, self.blocks.size
        new, vectors = pool.written[stream], self._vectors[stream]
        live, left = pool.live(stream), max(0, block - self.blocks.before)
        numbers = np.concatenate([live, np.arange(new, new + left)])[-pool.size :]
        known = np.concatenate([pool.vectors_of(stream, live), vectors[:left]])[-pool.size :]
        chosen = choose(kind, self.search, numbers, known, lambda: self._past(piece, block), vectors[block])
        fresh = pool.room + stream * (len(piece.ids) // size) + chosen - new
        places = np.where(chosen < new, pool.places(stream, chosen), fresh)
        return places, (chosen - new) * size, (chosen >= pool.begun[stream]).astype(np.int64)

    def _past(self, piece: Piece, block: int) -> Vector:
        """Return the vector of the text before a block, of which the last tokens are the query."""
        end = (piece.begin + block) * self.blocks.size
        ids = self.documents.ids(piece.document)[max(0, end - self.query_tokens) : end]
        text = str(self.tokenizer.decode(ids.tolist()))
        found: Vector = embedded_queries(self.embedder, [text])[0]
        return found

    def _other(
        self, stream: int, piece: Piece, block: int, rng: np.random.Generator
    ) -> tuple[Numbers, Numbers, Numbers]:
        """Return what the block's query finds in the memory of another stream, drawn, in the places of its own."""
        others = [each for each in range(len(self.pool.vectors)) if each != stream and len(self.pool.live(each))]
        if not others:
            return _nothing()
        other = others[int(rng.integers(len(others)))]
        live = self.pool.live(other)
        vectors = self.pool.vectors_of(other, live)
        found = self.search.chosen(live, vectors, self._past(piece, block), 0, self.search.top_k)
        offsets = (np.arange(len(found)) - len(found) - self.blocks.before) * self.blocks.size
        return self.pool.places(other, found), offsets, np.zeros(len(found), np.int64)

    def keep_step(self, pieces: Sequence[Piece], kv: Mapping[int, KeyValue]) -> None:
        """Remember the chunks of a step. kv: by memory layer, `[N, Hkv, S, D]`, the blocks of all rows."""
        blocks = len(pieces[0].ids) // self.blocks.size
        for stream, piece in enumerate(pieces):
            own = slice(stream * blocks, stream * blocks + piece.count)
            parts = {layer: (keys[own], values[own]) for layer, (keys, values) in kv.items()}
            self.pool.add(stream, parts, self._vectors[stream][: piece.count])

    def _embedded(self, chunks: list[list[int]]) -> Vector:
        """Return the vectors of chunks, `[n, dimension]`, by their text."""
        return embedded(self.embedder, [str(self.tokenizer.decode(chunk)) for chunk in chunks])


def _nothing() -> tuple[Numbers, Numbers, Numbers]:
    none = np.zeros(0, np.int64)
    return none, none, none


def _chunks(ids: Any, size: int) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64)).view(-1, size)


def _tensor(rows: list[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
