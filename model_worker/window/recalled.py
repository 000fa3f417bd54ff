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
    """A chunk that attention may use.

    chunk_id: the bank's; 0 where the bank has not named the chunk. start: its offset in the source. layers: its K-V
    (see capture.py). token_ids: the tokens that the chunk was made of, also where fewer are stored.
    """

    chunk_id: int
    start: int
    layers: Layers
    token_ids: tuple[int, ...] = ()

    @property
    def passage(self) -> tuple[int, tuple[int, ...]]:
        """Return the offset and the tokens, by which a chunk is known before its bank has named it."""
        return self.start, self.token_ids


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
        self._found: dict[int, Block] = {}
        self._recent: dict[int, Block] = {}
        self._place: tuple[Tensor, int] | None = None  # for which the keys below were rotated
        self._rotated: dict[object, RetrievedKV] = {}

    def replace(self, rows: Sequence[Sequence[RecalledChunk]]) -> None:
        """Hold these chunks instead of those found before; one list a batch row, each in the order of attention.

        Layers that one of the chunks does not have are left out.
        """
        self._found = self._blocks_of(rows)
        self._join()

    def follow(self, rows: Sequence[Sequence[RecalledChunk]]) -> None:
        """Hold these chunks of each row, the recent ones, behind those that were found."""
        self._recent = self._blocks_of(rows)
        self._join()

    def _blocks_of(self, rows: Sequence[Sequence[RecalledChunk]]) -> dict[int, Block]:
        """Return the chunks as blocks by memory layer, without layers that one of the chunks does not have."""
        if not any(rows):
            return {}
        present = set.intersection(*(set(chunk.layers) for row in rows for chunk in row))
        like = next(self._attachment.model.parameters())
        return {layer: block(rows, layer, like) for layer in self._attachment.plan.memory_layers if layer in present}

    def _join(self) -> None:
        """Attend to what was found and to what is recent, in this order."""
        layers = self._found.keys() | self._recent.keys()
        parts = {layer: [held[layer] for held in (self._found, self._recent) if layer in held] for layer in layers}
        self.blocks = {layer: own[0] if len(own) == 1 else joined(*own) for layer, own in parts.items()}
        self._place, self._rotated = None, {}

    def clear(self) -> None:
        """Hold no chunks any more."""
        self._found, self._recent = {}, {}
        self._join()

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
        """Return the tensors of what was found, by name."""
        return {
            f"block.{index}.{part.name}": getattr(held, part.name)
            for index, held in self._found.items()
            for part in fields(held)
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Hold the blocks of a `state` as found, whatever else is in it."""
        self.clear()
        for index in {int(name.split(".")[1]) for name in state if name.startswith("block.")}:
            self._found[index] = Block(*(state[f"block.{index}.{part.name}"] for part in fields(Block)))
        self._join()


def joined(first: Block, second: Block) -> Block:
    """Put one block behind another in every row."""
    heads = max(first.offsets.shape[1], second.offsets.shape[1])
    offsets = [part.offsets.expand(-1, heads, -1) for part in (first, second)]
    return Block(
        torch.cat([first.keys, second.keys], dim=2),
        torch.cat([first.values, second.values], dim=2),
        torch.cat(offsets, dim=2),
        torch.cat([first.valid, second.valid], dim=1),
    )


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
