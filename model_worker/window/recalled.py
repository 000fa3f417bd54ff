"""What stands before a window: chunks that were recalled, as blocks of K-V, and sinks; keys rotated to their places."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest

import torch
from torch import Tensor

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import RetrievedKV
from model_worker.attachment.moving_keys import MovingKeys
from model_worker.window.capture import Layers
from model_worker.window.columns import Columns
from model_worker.window.placement import Place, memory_positions, sink_positions
from model_worker.window.provenance import Provenance
from model_worker.window.sinks import Sinks


@dataclass(frozen=True, slots=True)
class RecalledChunk:
    """A chunk that attention may use.

    chunk_id: the bank's; 0 where the bank has not named the chunk. start: its offset in the source. layers: its K-V
    (see capture.py). token_ids: the tokens that the chunk was made of, also where fewer are stored. provenance: what
    its bank says of it, for people; None where it was not found by a search.
    """

    chunk_id: int
    start: int
    layers: Layers
    token_ids: tuple[int, ...] = ()
    provenance: Provenance | None = None

    @property
    def passage(self) -> tuple[int, tuple[int, ...]]:
        """Return the offset and the tokens, by which a chunk is known before its bank has named it."""
        return self.start, self.token_ids


@dataclass(frozen=True, slots=True)
class Attended:
    """A chunk that stands before a window, without its K-V.

    chunk_id, start, token_ids, provenance: see `RecalledChunk`; a start of -1 stands for chunks that a restored window
    attends to without their names. recent: whether the chunk is one of the last that left the window, and was not
    searched for. tokens: how many of its tokens stand in the block of each memory layer.
    """

    chunk_id: int
    start: int
    token_ids: tuple[int, ...]
    provenance: Provenance | None
    recent: bool
    tokens: Mapping[int, int]

    @property
    def passage(self) -> tuple[int, tuple[int, ...]]:
        """Return the offset and the tokens, by which a chunk is known before its bank has named it."""
        return self.start, self.token_ids

    @classmethod
    def of(cls, chunk: RecalledChunk, layers: Collection[int], recent: bool) -> "Attended":
        """Return the chunk as it stands in the blocks of these memory layers."""
        tokens = {layer: chunk.layers[layer][0].shape[1] for layer in layers}
        return cls(chunk.chunk_id, chunk.start, chunk.token_ids, chunk.provenance, recent, tokens)


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
    """The blocks that a window attends to, by memory layer, behind its sinks; rotated keys are kept until one moves.

    sinks: those of the window; by default it has none. chunks: of each row, in the order in which they stand in the
    blocks; another object as soon as other chunks are held.
    """

    def __init__(self, attachment: Attachment, sinks: Sinks | None = None):
        self._attachment, self._sinks = attachment, Sinks(0) if sinks is None else sinks
        self.blocks: dict[int, Block] = {}
        self._found: dict[int, Block] = {}
        self._recent: dict[int, Block] = {}
        self._chunks: list[list[list[Attended]]] = [[], []]  # of what was found and of what is recent
        self.chunks: list[list[Attended]] = []
        self._place: Place | None = None  # for which the keys below were rotated
        self._sinks_held = 0
        self._rotated: dict[object, Tensor] = {}  # keys of blocks, by memory layer and rotation
        self._moving: dict[object, MovingKeys] = {}  # the same, where they move with each token
        self._before: dict[int, RetrievedKV] = {}
        self._own: dict[int, Tensor] = {}  # by layer: which recalled tokens are sinks

    def replace(self, rows: Sequence[Sequence[RecalledChunk]]) -> None:
        """Hold these chunks instead of those found before; one list a batch row, each in the order of attention.

        Layers that one of the chunks does not have are left out.
        """
        self._found = self._blocks_of(rows)
        self._chunks[0] = [[Attended.of(chunk, self._found, False) for chunk in row] for row in rows]
        self._join()

    def follow(self, rows: Sequence[Sequence[RecalledChunk]]) -> None:
        """Hold these chunks of each row, the recent ones, behind those that were found."""
        self._recent = self._blocks_of(rows)
        self._chunks[1] = [[Attended.of(chunk, self._recent, True) for chunk in row] for row in rows]
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
        self._place, self._rotated, self._moving, self._before, self._own = None, {}, {}, {}, {}
        self.chunks = [[*found, *recent] for found, recent in zip_longest(*self._chunks, fillvalue=())]

    def clear(self) -> None:
        """Hold no chunks any more."""
        self._found, self._recent, self._chunks = {}, {}, [[], []]
        self._join()

    @property
    def tokens(self) -> int:
        """Return how many memory tokens a retrieval layer attends to, in the longest row."""
        return max((b.keys.shape[2] for b in self.blocks.values()), default=0)

    def retrieved(self, columns: Columns) -> dict[int, RetrievedKV]:
        """Return what each layer attends to before a window with these columns, rotated; nothing for other layers."""
        if not self.blocks and not self._sinks.tokens:
            return {}
        place = Place(columns.first(), columns.first_new(), columns.origin)
        held = 0 if self._sinks.held is None else int(self._sinks.held.sum())
        positions, last = self._attachment.plan.positions, self._place
        if last is None or held != self._sinks_held or place.moved(last, positions):
            same = last is not None and held == self._sinks_held
            self._rotated, self._own = {}, self._own if same else {}
            self._place, self._sinks_held = place, held
            keeps = place.keeps_sinks if self._sinks.tokens else place.keeps_rest
            if last is not None and same and keeps(last, positions):
                self._before = self._moved()
            else:
                self._before = self._all()
        return self._before

    def _all(self) -> dict[int, RetrievedKV]:
        """Return the retrieved K-V of all layers that have any."""
        if self._sinks.tokens:
            return {layer: self._behind_sinks(layer) for layer in self._sinks.layers}
        found: dict[int, RetrievedKV] = {}
        shared: dict[object, RetrievedKV] = {}
        for layer in self._attachment.plan.retrieval_layers:
            if (source := self._source(layer)) is None:
                continue
            # Layers that take the same block and rotate alike share it; a gate is a layer's own.
            key = (source, self._attachment.ropes[layer].key, layer if layer in self._attachment.gates else None)
            if key not in shared:
                held = self.blocks[source]
                keys = self._put(layer, source, self._positions(source, held.valid))
                valid = None if bool(held.valid.all()) else held.valid
                shared[key] = RetrievedKV(keys, held.values, valid, self._attachment.gates.get(layer))
            found[layer] = shared[key]
        return found

    def _source(self, layer: int) -> int | None:
        """Return the memory layer whose block a layer attends to; None for a layer that attends to none."""
        plan = self._attachment.plan
        if layer not in plan.retrieval_layers:
            return None
        source = plan.source(layer)
        return source if source in self.blocks else None

    def _moved(self) -> dict[int, RetrievedKV]:
        """Return what all layers attend to where nothing but the blocks have moved: all but their keys is as before.

        So does each token that is decoded move a memory that is `near`, which has one position and no numbering.
        """
        moved: dict[int, RetrievedKV] = {}  # by what was attended to before, which layers share
        for layer, before in self._before.items():
            if id(before) in moved:
                continue
            moved[id(before)] = before
            if (source := self._source(layer)) is not None:
                keys = self._put_on(layer, source, self._positions(source, self.blocks[source].valid))
                keys = torch.cat([before.keys[:, :, : before.sinks], keys], 2) if before.sinks else keys
                moved[id(before)] = replace(before, keys=keys)
        return {layer: moved[id(before)] for layer, before in self._before.items()}

    def _positions(self, source: int, valid: Tensor) -> Tensor:
        """Return where the plan puts the block of a memory layer; see `memory_positions`. valid: `[B, R]`."""
        assert self._place is not None
        return memory_positions(self._attachment.plan.positions, self._place, self.blocks[source].offsets, valid)

    def _put(self, layer: int, source: int, positions: Tensor) -> Tensor:
        """Return a block's keys at these positions, rotated as a layer does; layers that rotate alike share them."""
        rope = self._attachment.ropes[layer]
        key = source, rope.key
        if key not in self._rotated:
            self._rotated[key] = rope.rotate(self.blocks[source].keys, positions)
        return self._rotated[key]

    def _put_on(self, layer: int, source: int, positions: Tensor) -> Tensor:
        """Return what `_put` returns, for keys that move by a token: those of a row are at one of the positions
        `[B, 1]`."""
        rope = self._attachment.ropes[layer]
        key = source, rope.key
        if not rope.rotates:
            return self._put(layer, source, positions)
        if key not in self._rotated:
            if key not in self._moving:
                self._moving[key] = MovingKeys(rope, self.blocks[source].keys)
            self._rotated[key] = self._moving[key].at(positions)
        return self._rotated[key]

    def _behind_sinks(self, layer: int) -> RetrievedKV:
        """Return the sinks of one layer, and behind them the block that it attends to, without the sinks in it."""
        assert self._place is not None
        assert self._sinks.held is not None
        plan, sinks, count = self._attachment.plan.positions, self._sinks, self._sinks.tokens
        source, keys, values = self._source(layer), [], []
        valid, follows = [sinks.there], self._place.first
        if source is not None:
            held = self.blocks[source]
            recalled = held.valid & ~self._sinks_in(source, held)
            positions = self._positions(source, recalled)
            keys, values = [self._put(layer, source, positions)], [held.values]
            valid = [*valid, recalled]
            if positions.ndim == 2:
                follows = torch.where(recalled, positions, follows[:, None]).amin(1).minimum(follows)
        own, own_values = (part[:, :, :count] for part in sinks.layers[layer])
        at = sink_positions(plan, self._place.origin, sinks.offsets[:, :count], self._sinks.held, follows)
        own = self._attachment.ropes[layer].rotate(own, at)
        seen = torch.cat(valid, 1)
        return RetrievedKV(
            torch.cat([own, *keys], 2),
            torch.cat([own_values, *values], 2),
            None if bool(seen.all()) else seen,
            self._attachment.gates.get(layer),
            count,
        )

    def _sinks_in(self, layer: int, held: Block) -> Tensor:
        """Return which tokens of a layer's block are sinks, bool `[B, R]`.

        Keys of a model's first layer depend on nothing but the token: the lowest layer tells for all that keep the
        same tokens.
        """
        lowest = min(self.blocks)
        if layer != lowest and torch.equal(held.offsets, self.blocks[lowest].offsets):
            layer, held = lowest, self.blocks[lowest]
        if layer not in self._own:
            self._own[layer] = self._sinks.among(layer, held.keys, held.offsets)
        return self._own[layer]

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
        if self._found:  # a state does not say which chunks these were
            tokens = {index: held.keys.shape[2] for index, held in self._found.items()}
            self._chunks[0] = [[Attended(0, -1, (), None, False, tokens)]]
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
