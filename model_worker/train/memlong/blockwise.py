"""Rows of blocks go through a model in one forward, and each block attends as the worker would have it attend.

A worker feeds blocks one after the other: it attends to the window before each, and to the memory that was recalled for
it. Here all blocks of a row go through a layer at once. Each block becomes a row of the attention's batch, with the
keys of its own window, its own memory and the sinks of its document; the model's own backend attends. So the model's
code runs unchanged, and what comes out is what `window.cache.MemoryCache` gives (a test holds both together).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import Backend, RetrievedKV, retrieval_causal_attention
from model_worker.attachment.model_parts import layer_of
from model_worker.train.memlong.block_memory import BlockMemory
from model_worker.train.memlong.encoding import KeepingView
from model_worker.train.memlong.forward import KeyValue, OneForward
from model_worker.train.memlong.rows import Blocks, Rows
from model_worker.window.placement import Place, memory_positions, sink_positions


@dataclass(frozen=True)
class Places:
    """Where the windows, the sinks and the memory of the N blocks of some rows stand; positions count from a row's
    first token.
    """

    blocks: Blocks
    rows: Rows
    positions: str

    @cached_property
    def count(self) -> int:
        """Return the blocks of a row."""
        return self.rows.ids.shape[1] // self.blocks.size

    @cached_property
    def first(self) -> Tensor:
        """Return where the window of each block begins, `[N]`."""
        begins: Tensor = self.blocks.first(self.count).to(self.rows.ids.device).repeat(len(self.rows.ids))
        return begins

    @cached_property
    def place(self) -> Place:
        """Return where the windows stand while their blocks are fed."""
        new = torch.arange(self.count, device=self.first.device) * self.blocks.size
        return Place(self.first, new.repeat(len(self.rows.ids)), 0)

    @cached_property
    def begins(self) -> Tensor:
        """Return the offset of the row of each block in its document, `[N]`."""
        return self.rows.begins.repeat_interleave(self.count)

    @cached_property
    def held(self) -> Tensor:
        """Return how many sinks have left the window before each block, `[N]`."""
        return (self.begins + self.first).clamp(max=self.rows.sinks.shape[1])

    @cached_property
    def local(self) -> Tensor:
        """Return which keys of its window each query of a block sees, bool `[N, 1, S, window]`.

        The keys before a row's first block are no tokens.
        """
        size, window = self.blocks.size, self.blocks.window
        causal = torch.ones(size, window, dtype=torch.bool, device=self.first.device).tril(window - size)
        keys = torch.arange(window, device=self.first.device) - self.blocks.before * size
        there = self.place.new[:, None] + keys >= 0
        return (causal & there[:, None])[:, None]

    def memory(self, memory: BlockMemory) -> tuple[Tensor, Tensor]:
        """Return the positions of the memory's tokens, `[N, M]` or `[N, 1]`, and which of them are attended to,
        `[N, M]`: those that are there and no sinks.
        """
        offsets = memory.token_offsets(self.blocks.size)
        sink = (offsets + self.begins[:, None] < self.held[:, None]) & memory.own.repeat_interleave(self.blocks.size, 1)
        there = memory.valid(self.blocks.size) & ~sink
        return memory_positions(self.positions, self.place, offsets[:, None], there).flatten(1), there

    def sinks(self, memory: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the positions of the sinks and which of them are there, both `[N, F]`. memory: what `memory` gave."""
        follows = self.first
        if memory is not None:
            at, there = memory
            follows = torch.where(there, at, follows[:, None]).amin(1).minimum(follows)
        order = torch.arange(self.rows.sinks.shape[1], device=follows.device)
        offsets = order - self.begins[:, None]
        return sink_positions(self.positions, 0, offsets, self.held, follows), order < self.held[:, None]


class BlockwiseView(KeepingView):
    """The forward of some rows, whose input is their sinks and then their blocks.

    memory: what the blocks attend to; None for nothing. gates: by layer, `[Hq]`, instead of the attachment's.
    """

    def __init__(
        self,
        attachment: Attachment,
        places: Places,
        memory: BlockMemory | None = None,
        gates: Mapping[int, Tensor] | None = None,
    ):
        super().__init__(attachment)
        self._places, self._memory = places, memory
        self._gates = attachment.gates if gates is None else gates
        self._front = places.rows.sinks.shape[1]
        self._at = None if memory is None else places.memory(memory)
        self._sinks_at: dict[bool, tuple[Tensor, Tensor]] = {}
        if self._front:
            self._sinks_at = {True: places.sinks(self._at), False: places.sinks(None)}
        self._masks: dict[object, Tensor] = {}
        self._gathered: dict[int, KeyValue] = {}
        self._rotated: dict[object, Tensor] = {}

    def attend(
        self,
        backend: Backend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of one layer; the mask of the model, which knows no blocks, is not looked at."""
        self.observe(module, query, key, value, kwargs)
        layer, front = layer_of(module), self._front
        local = self._mask("local", self._places.local, query)
        retrieved = self._attended(layer, key, value)
        blocks = self._queries(query), self._windows(key), self._windows(value)
        found, _ = retrieval_causal_attention(backend, module, *blocks, local, retrieved, **kwargs)
        attended = found.reshape(len(query), -1, *found.shape[2:])
        if front:
            own = self._mask("sinks", torch.ones(front, front, dtype=torch.bool, device=key.device).tril(), query)
            parts = (part[:, :, :front] for part in (query, key, value))
            first, _ = backend(module, *parts, own, **kwargs)
            attended = torch.cat([first, attended], 1)
        return attended, None

    def _mask(self, name: str, seen: Tensor, query: Tensor) -> Tensor:
        """Return who sees whom in the form that the backend takes, made once a forward for each dtype."""
        key = name, query.dtype
        if key not in self._masks:
            every = seen.expand(1, 1, -1, -1) if seen.ndim == 2 else seen
            self._masks[key] = self.attachment.as_mask(every, query)
        return self._masks[key]

    def _queries(self, query: Tensor) -> Tensor:
        """Return queries `[B, H, F + n * S, D]` by block, `[N, H, S, D]`, without those of sinks."""
        size = self._places.blocks.size
        blocks = query[:, :, self._front :].unfold(2, size, size)
        return blocks.permute(0, 2, 1, 4, 3).flatten(0, 1)

    def _windows(self, keys: Tensor) -> Tensor:
        """Return keys or values `[B, H, F + n * S, D]` of each block's window, `[N, H, window, D]`.

        Before a row there are zeros.
        """
        size, window = self._places.blocks.size, self._places.blocks.window
        padded = functional.pad(keys[:, :, self._front :], (0, 0, window - size, 0)).unfold(2, window, size)
        return padded.permute(0, 2, 1, 4, 3).flatten(0, 1)

    def _attended(self, layer: int, key: Tensor, value: Tensor) -> RetrievedKV | None:
        """Return what the blocks attend to in one layer besides their windows: sinks, and behind them memory."""
        plan = self.attachment.plan
        remembers = self._memory is not None and layer in plan.retrieval_layers
        keys, values, valid, held = [], [], [], 0
        if self._sinks_at:
            at, there = self._sinks_at[remembers]  # sinks stand before what a layer attends to
            keys, values, valid, held = [self._sinks(layer, key, at)], [self._by_block(value)], [there], self._front
        if remembers:
            source = plan.source(layer)
            assert self._at is not None
            keys.append(self._memory_keys(layer, source))
            values.append(self._of(source)[1])
            valid.append(self._at[1])
        if not keys:
            return None
        seen = torch.cat(valid, 1)
        gate = self._gates.get(layer)
        if gate is not None:
            # A block with neither memory nor sinks attends to its window alone, without a gate.
            gate = gate * seen.any(1, keepdim=True)
        return RetrievedKV(torch.cat(keys, 2), torch.cat(values, 2), seen, gate, held)

    def _sinks(self, layer: int, key: Tensor, to: Tensor) -> Tensor:
        """Return the keys of the sinks of each block, `[N, H, F, D]`, moved to the positions `to` `[N, F]`."""
        positions = torch.arange(self._front, device=key.device)[None]
        return self.attachment.ropes[layer].move(self._by_block(key), positions, to)

    def _by_block(self, rows: Tensor) -> Tensor:
        """Return the sinks of the rows `[B, H, F + n * S, D]` for each block, `[N, H, F, D]`."""
        return rows[:, :, : self._front].repeat_interleave(self._places.count, 0)

    def _of(self, source: int) -> KeyValue:
        """Return the memory of each block as a memory layer made it, `[N, H, M, D]`, keys before RoPE."""
        assert self._memory is not None
        if source not in self._gathered:
            fresh = self._memory.fresh
            self._gathered[source] = self._memory.gathered(
                source, self.chunks(source) if fresh is None else fresh[source]
            )
        return self._gathered[source]

    def _memory_keys(self, layer: int, source: int) -> Tensor:
        """Return the keys of the memory where they stand, rotated as a layer does; layers that rotate alike share."""
        rope = self.attachment.ropes[layer]
        key = source, rope.key
        if key not in self._rotated:
            assert self._at is not None
            self._rotated[key] = rope.rotate(self._of(source)[0], self._at[0])
        return self._rotated[key]

    def chunks(self, layer: int) -> KeyValue:
        """Return the K-V of a memory layer by chunk, `[N, H, S, D]`, as this forward made them behind their windows."""
        keys, values = map(self._queries, self.kept[layer])
        return keys, values


def blockwise_logits(model: nn.Module, view: BlockwiseView, rows: Rows) -> Tensor:
    """Return the logits `[B, n * S, vocabulary]` of the blocks of some rows, by one forward of `model`."""
    front, count = rows.sinks.shape[1], rows.ids.shape[1]
    device = rows.ids.device
    positions = torch.cat([torch.arange(front, device=device), torch.arange(count, device=device)])[None]
    ids = torch.cat([rows.sinks, rows.ids], 1) if front else rows.ids
    found: Tensor = model(input_ids=ids, past_key_values=OneForward(view.attachment, view, positions)).logits
    return found[:, front:]
