"""MemLong's training forward of a Llama, computed plainly: loops over blocks and tokens, and no code of the worker.

Every query attends to a list of keys, each of which was put at its own position by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Part = tuple[Tensor, Tensor, Tensor, bool]  # keys, values, positions, whether they were recalled
Chunk = tuple[Tensor, Tensor, int]  # keys without rotation and values `[H, S, D]`, offset of the first in the row


def turned(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotate `x` `[H, T, D]` to `position` `[T]` in pairs that are half a head apart."""
    half = x.shape[-1] // 2
    angle = position[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass
class PlainRow:
    """One row of a document in blocks of `size` tokens, which see `before` blocks before them.

    chunks: gives what a block attends to in a layer, when it is told the block, the layer, and the K-V of the row's
    chunks there. begin: of the row in its document. sinks: ids of the document's first tokens. gates: by layer.
    """

    model: Any
    ids: Tensor
    size: int
    before: int
    retrieval: tuple[int, ...]
    chunks: Callable[[int, int, Callable[[int], list[Chunk]]], list[Chunk]]
    near: int | None = None
    begin: int = 0
    sinks: tuple[int, ...] = ()
    gates: dict[int, Tensor] | None = None

    def logits(self) -> Tensor:
        """Return `[T, vocabulary]`."""
        net, kv = self.model.model, {}
        hidden = net.embed_tokens(self.ids)
        front = net.embed_tokens(torch.tensor(self.sinks, dtype=torch.long))
        for index, layer in enumerate(net.layers):
            own = self._project(layer, hidden)
            kv[index] = self._by_chunk(*own[1:])
            outs = [self._block(index, block, own, self._project(layer, front), kv) for block in range(len(kv[index]))]
            hidden = self._rest(layer, hidden, torch.cat(outs, 1))
            if self.sinks:
                front = self._rest(layer, front, self._causal(index, *self._project(layer, front)))
        return self.model.lm_head(net.norm(hidden))

    def _causal(self, index: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return what tokens attend to that see each other and those before."""
        at, outs = torch.arange(query.shape[1]), []
        for end in range(1, len(at) + 1):
            seen = keys[:, :end], values[:, :end], at[:end], False
            outs.append(self._attend(index, query[:, end - 1 : end], at[end - 1 : end], [seen]))
        return torch.cat(outs, 1)

    def _project(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        size = attention.head_dim
        q, k, v = (
            functional.linear(x, p.weight).view(len(x), len(p.weight) // size, size).transpose(0, 1)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return q, k, v

    def _rest(self, layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + layer.self_attn.o_proj(attended.transpose(0, 1).flatten(1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _by_chunk(self, keys: Tensor, values: Tensor) -> list[Chunk]:
        starts = range(0, keys.shape[1], self.size)
        return [(keys[:, at : at + self.size], values[:, at : at + self.size], at) for at in starts]

    def _block(self, index: int, block: int, own: Any, front: Any, kv: dict[int, list[Chunk]]) -> Tensor:
        """Return what one block attends to in a layer, `[Hq, size, D]`."""
        query, keys, values = own
        new = block * self.size
        first = max(0, block - self.before) * self.size
        memory = first - 1 if self.near is None else max(first - 1, new - 1 - self.near)
        held = min(len(self.sinks), self.begin + first)
        parts, lowest = [], first
        for k, v, offset in self.chunks(block, index, kv.__getitem__) if index in self.retrieval else []:
            stays = [i for i in range(self.size) if offset + i + self.begin >= held or offset + i + self.begin < 0]
            if stays:
                lowest = min(lowest, memory)
                parts.append((k[:, stays], v[:, stays], torch.full((len(stays),), memory), True))
        if held:
            at = torch.arange(lowest - held, lowest)
            parts.append((front[1][:, :held], front[2][:, :held], at, False))
        outs = []
        for token in range(new, new + self.size):
            span = slice(first, token + 1)
            local = (keys[:, span], values[:, span], torch.arange(first, token + 1), False)
            outs.append(self._attend(index, query[:, token : token + 1], torch.tensor([token]), [*parts, local]))
        return torch.cat(outs, 1)

    def _attend(
        self, index: int, query: Tensor, at: Tensor, parts: list[tuple[Tensor, Tensor, Tensor, bool]]
    ) -> Tensor:
        """Attend with one softmax to keys that stand where they are said to stand; those of memory have a gate."""
        theta = float(self.model.config.rope_parameters["rope_theta"])
        groups = len(query) // len(parts[0][0])
        query = turned(query, at, theta)
        gate = (self.gates or {}).get(index) if len(parts) > 1 else None
        scores, values = [], []
        for k, v, position, recalled in parts:
            score = query @ turned(k, position, theta).repeat_interleave(groups, 0).mT * query.shape[-1] ** -0.5
            if gate is not None:
                score = score * (gate if recalled else 1 - gate)[:, None, None]
            scores.append(score)
            values.append(v.repeat_interleave(groups, 0))
        return torch.cat(scores, -1).softmax(-1) @ torch.cat(values, 1)


def encoded_alone(model: Any, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Return keys without rotation and values `[H, S, D]` that a layer makes of a chunk alone."""
    row = PlainRow(model, ids, len(ids), 0, (), lambda block, index, kv: [])
    hidden = model.model.embed_tokens(ids)
    for block in model.model.layers[:layer]:
        own = row._project(block, hidden)
        hidden = row._rest(block, hidden, row._block(0, 0, own, own, {}))
    _, keys, values = row._project(model.model.layers[layer], hidden)
    return keys, values
