"""What the blocks of a step attend to besides their windows: chunks of a pool, and chunks of the step itself."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.train.memlong.forward import KeyValue

NOTHING = -1


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """The chunks that each of N blocks attends to, in the order of attention; a chunk has S tokens, as a block has.

    places: `[N, K]`, of chunks in the pool, from `pooled` on of the step's own chunks (`pooled` + n is block n itself),
    or `NOTHING`. offsets: `[N, K]`, of a chunk's first token from the first token of the block's row; they are below 0
    for earlier chunks. own: bool `[N, K]`, whether a chunk is of the row's own document, whose first tokens may be
    sinks. pooled: how many chunks the pool has room for. pool: its K-V by memory layer, `[pooled, Hkv, S, D]`; a layer
    may be missing where nothing is taken of it. fresh: K-V of the step's chunks by layer, `[N, Hkv, S, D]`; None
    where the step's own forward makes them. gradients: whether gradients go through the K-V of the step's chunks.
    """

    places: Tensor
    offsets: Tensor
    own: Tensor
    pooled: int
    pool: Mapping[int, KeyValue]
    fresh: Mapping[int, KeyValue] | None = None
    gradients: bool = False

    def gathered(self, layer: int, fresh: KeyValue) -> KeyValue:
        """Return the K-V of one memory layer for each block, `[N, Hkv, K * S, D]`, zeros where there is nothing.

        fresh: of the step's chunks, `[N, Hkv, S, D]`.
        """
        flat = self.places.flatten()
        stored, own = (flat >= 0) & (flat < self.pooled), flat >= self.pooled
        pool = self.pool.get(layer, (fresh[0][:0], fresh[1][:0]))
        found = []
        for part, made in zip(pool, fresh, strict=True):
            new = made if self.gradients else made.detach()
            taken = new.new_zeros(len(flat), *new.shape[1:])
            taken[stored] = part[flat[stored]].to(new.dtype)
            if bool(own.any()):
                taken = taken.index_put((own.nonzero()[:, 0],), new[flat[own] - self.pooled])
            found.append(self._by_block(taken))
        return found[0], found[1]

    def _by_block(self, chunks: Tensor) -> Tensor:
        """Put the chunks `[N * K, Hkv, S, D]` of each block one behind the other."""
        blocks, count = self.places.shape
        return chunks.view(blocks, count, *chunks.shape[1:]).transpose(1, 2).flatten(2, 3)

    def valid(self, size: int) -> Tensor:
        """Return which tokens are there, bool `[N, K * S]`. size: tokens of a chunk (S)."""
        return (self.places >= 0).repeat_interleave(size, 1)

    def token_offsets(self, size: int) -> Tensor:
        """Return the offsets of all tokens from the first of the row, `[N, K * S]`. size: tokens of a chunk (S)."""
        return (self.offsets[..., None] + torch.arange(size, device=self.offsets.device)).flatten(1)
