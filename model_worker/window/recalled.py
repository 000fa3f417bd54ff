"""What was recalled into a window: chunks as blocks of K-V, and their keys rotated to where the window needs them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import RetrievedKV
from model_worker.window.capture import Layers
from model_worker.window.columns import Columns


@dataclass(frozen=True, slots=True)
class RecalledChunk:
    """A chunk that attention may use. start: its offset in the source. layers: its K-V (see capture.py)."""

    chunk_id: int
    start: int
    layers: Layers


@dataclass(slots=True)
class Block:
    """Recalled K-V of one memory layer, keys before RoPE, padded over the batch.

    keys, values: `[B, Hkv, R, D]`. offsets: `[B, 1 or Hkv, R]`, in the source. valid: `[B, R]`, false for pads.
    """

    keys: Tensor
    values: Tensor
    offsets: Tensor
    valid: Tensor


class Recalled:
    """The blocks that a window attends to, by memory layer; their rotated keys are kept until window or blocks move."""

    def __init__(self, attachment: Attachment):
        self._attachment = attachment
        self.blocks: dict[int, Block] = {}
        self._place: tuple[Tensor, int] | None = None  # for which the keys below were rotated
        self._rotated: dict[object, RetrievedKV] = {}

    def replace(self, rows: Sequence[Sequence[RecalledChunk]]) -> None:
        """Hold these chunks instead of what was held; one list a batch row, each in the order of attention.

        Layers that one of the chunks does not have are left out.
        """
        self.clear()
        if any(rows):
            present = set.intersection(*(set(chunk.layers) for row in rows for chunk in row))
            for layer in present.intersection(self._attachment.plan.memory_layers):
                self.blocks[layer] = block(rows, layer, next(self._attachment.model.parameters()))

    def clear(self) -> None:
        """Hold no chunks any more."""
        self.blocks, self._place, self._rotated = {}, None, {}

    @property
    def tokens(self) -> int:
        """Return how many memory tokens a retrieval layer attends to, in the longest row."""
        return max((b.keys.shape[2] for b in self.blocks.values()), default=0)

    def retrieved(self, columns: Columns) -> dict[int, RetrievedKV]:
        """Return the recalled K-V by retrieval layer, rotated for a window with these columns."""
        if not self.blocks:
            return {}
        first, origin = columns.first(), columns.origin
        if self._place is None or self._place[1] != origin or not torch.equal(self._place[0], first):
            self._place, self._rotated = (first, origin), {}
        plan, ropes = self._attachment.plan, self._attachment.ropes
        found = {}
        for layer in plan.retrieval_layers:
            source = plan.source(layer)
            if source not in self.blocks:
                continue
            # Layers that take the same block and rotate alike share it; a gate is a layer's own.
            key = (source, ropes[layer].key, layer if layer in self._attachment.gates else None)
            if key not in self._rotated:
                self._rotated[key] = self._rotate(self.blocks[source], layer, first, origin)
            found[layer] = self._rotated[key]
        return found

    def _rotate(self, held: Block, layer: int, first: Tensor, origin: int) -> RetrievedKV:
        """Return a block for one retrieval layer, its keys where the plan puts them before `first` `[B]`."""
        if self._attachment.plan.positions == "zero":
            positions = (first - 1)[:, None].expand_as(held.valid)
        elif self._attachment.plan.positions == "continual":
            order = held.valid.long().cumsum(-1)
            positions = first[:, None] - order[:, -1:] + order - 1
        else:
            positions = held.offsets - origin  # by head, where heads keep different tokens
        keys = self._attachment.ropes[layer].rotate(held.keys, positions)
        valid = None if bool(held.valid.all()) else held.valid
        return RetrievedKV(keys, held.values, valid, self._attachment.gates.get(layer))

    def state(self) -> dict[str, Tensor]:
        """Return the blocks' tensors by name."""
        return {
            f"block.{index}.{part.name}": getattr(held, part.name)
            for index, held in self.blocks.items()
            for part in fields(held)
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Hold the blocks of a `state`, whatever else is in it."""
        self.clear()
        for index in {int(name.split(".")[1]) for name in state if name.startswith("block.")}:
            self.blocks[index] = Block(*(state[f"block.{index}.{part.name}"] for part in fields(Block)))


def block(rows: Sequence[Sequence[RecalledChunk]], layer: int, like: Tensor) -> Block:
    """Put the chunks of each row one behind the other, as K-V of one layer with dtype and device of `like`."""
    parts = [[(*chunk.layers[layer], chunk.start) for chunk in row] for row in rows]
    length = max(sum(keys.shape[1] for keys, *_ in row) for row in parts)
    heads, _, dim = next(keys.shape for row in parts for keys, *_ in row)
    shape = (len(rows), heads, length, dim)
    own = heads if any(offsets.ndim == 2 for row in parts for _, _, offsets, _ in row) else 1
    made = Block(
        torch.zeros(shape, dtype=like.dtype, device=like.device),
        torch.zeros(shape, dtype=like.dtype, device=like.device),
        torch.zeros((len(rows), own, length), dtype=torch.long, device=like.device),
        torch.zeros((len(rows), length), dtype=torch.bool, device=like.device),
    )
    for index, row in enumerate(parts):
        at = 0
        for keys, values, offsets, start in row:
            to = at + keys.shape[1]
            made.keys[index, :, at:to] = keys
            made.values[index, :, at:to] = values
            made.offsets[index, :, at:to] = offsets + start
            made.valid[index, at:to] = True
            at = to
    return made
