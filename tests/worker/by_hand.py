"""A window with sinks and memory, computed by hand: plain transformers, an explicit mask, and a position for every key.

Nothing of the worker's window is used. Every key is kept without rotation, as float64, and is put for each forward
where it is to stand; the plain model then runs with a plain cache of these keys.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def angles(net: PreTrainedModel, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[B, 1, T, rotated / 2]` in float64 of one layer at `positions` `[B, T]`."""
    config: Any = net.config
    rope = dict(config.rope_parameters)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] in rope:
        rope = rope[kinds[layer]]
    assert rope.get("rope_type", "default") == "default"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(size * rope.get("partial_rotary_factor", 1.0))
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    turned = positions[:, None, :, None].double() * frequencies
    return turned.cos(), turned.sin()


def turn(keys: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the first numbers of `keys` `[B, H, T, D]` in pairs that are half of them apart."""
    half = cosines.shape[-1]
    first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], -1)


def raw_kv(net: PreTrainedModel, cache: DynamicCache, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the last keys of each layer, which stand at `positions` `[B, T]`, without rotation, and their values."""
    found = []
    for index, layer in enumerate(cache.layers):
        keys, values = (part[:, :, -positions.shape[1] :].double() for part in (layer.keys, layer.values))
        cosines, sines = angles(net, index, positions)
        found.append((turn(keys, cosines, -sines), values))
    return found


@dataclass
class Stream:
    """A stream of tokens `[B, T]` that is fed in pieces, of which a row may begin with pads.

    window, chunk: columns that are held, and that leave at once (0: as many as have to). sinks: tokens that stay.
    positions: of the plan, `near:N` too. everything: attend to all tokens that have left, at their own distance, as a
    local rule does that has room for all; sinks stand before the window all the same. memory: what was recalled, by
    layer: keys without rotation, values, offsets `[B, R]`, which of them are no pads.
    """

    net: PreTrainedModel
    window: int
    chunk: int
    sinks: int
    positions: str
    memory: tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor] | None = None
    everything: bool = False
    fed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    dropped: int = 0

    def feed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of new tokens `[B, Q]`; mask: `[B, T]`, over all tokens so far."""
        new, past = ids.shape[1], mask.shape[1] - ids.shape[1]
        while past > self.dropped and (over := past - self.dropped + new - self.window) > 0:
            self.dropped += min(self.chunk or over, past - self.dropped)
        valid, order = mask.bool(), (mask.cumsum(1) - 1).clamp(min=0)
        places, seen = self._before(valid, order, past)
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._keys(past)):
            cache.update(turn(keys, *angles(self.net, index, places)).float(), values.float(), index)
        causal = torch.ones(new, new, dtype=torch.bool).tril() & valid[:, None, past:] | torch.eye(
            new, dtype=torch.bool
        )
        allowed = torch.cat([seen[:, None].expand(-1, new, -1), causal], -1)[:, None]
        lowest = torch.finfo(torch.float32).min
        additive = torch.zeros(allowed.shape).masked_fill(~allowed, lowest)
        kinds = set(getattr(self.net.config, "layer_types", None) or ())
        own = dict.fromkeys(kinds, additive) if len(kinds) > 1 else additive
        at = order[:, past:]
        logits: Tensor = self.net(ids, attention_mask=own, position_ids=at, past_key_values=cache).logits
        came = raw_kv(self.net, cache, at)
        self.fed = (
            [(torch.cat([a, c], 2), torch.cat([b, d], 2)) for (a, b), (c, d) in zip(self.fed, came, strict=True)]
            if self.fed
            else came
        )
        return logits

    def _keys(self, past: int) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of what is attended to: those that have left, what was recalled, and the window."""
        begin, found = 0 if self.everything else self.dropped, []
        for index in range(len(self.fed) if self.memory is None else len(self.memory[0])):
            recalled = None if self.memory is None else self.memory[0][index]
            kv = self.fed[index] if self.fed else tuple(part[:, :, :0] for part in recalled or ())
            keys, values = (
                torch.cat([own[:, :, : self.dropped], *others, own[:, :, begin:past]], 2)
                for own, others in zip(kv, [()] * 2 if recalled is None else [[part] for part in recalled], strict=True)
            )
            found.append((keys, values))
        return found

    def _before(self, valid: Tensor, order: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Return positions of the tokens of `_keys`, and which of them are seen; both `[B, L]`."""
        begin = 0 if self.everything else self.dropped
        sink = valid[:, : self.dropped] & (order[:, : self.dropped] < self.sinks)
        first, new = (_first(valid[:, at:], order[:, at:]) for at in (self.dropped, past))
        places, seen = [order[:, begin:past]], [valid[:, begin:past].clone()]
        seen[0][:, : self.dropped - begin] &= ~sink[:, begin:]
        follows = first
        if self.memory is not None:
            _, offsets, there = self.memory
            recalled = self._recalled(first, new, offsets, there)
            follows = torch.minimum(first, recalled.masked_fill(~there, 1 << 40).amin(1))
            places, seen = [recalled, *places], [there, *seen]
        own = order[:, : self.dropped]
        if self.positions != "original":
            own = (follows - sink.sum(1))[:, None] + own
        return torch.cat([own, *places], 1), torch.cat([sink, *seen], 1)

    def _recalled(self, first: Tensor, new: Tensor, offsets: Tensor, there: Tensor) -> Tensor:
        """Return the positions of recalled tokens, `[B, R]`."""
        if self.positions == "original":
            return offsets
        if self.positions == "continual":
            behind = there.flip(1).cumsum(1).flip(1)  # tokens from here to the window
            return first[:, None] - behind
        at = first - 1
        if self.positions.startswith("near:"):
            at = torch.maximum(at, new - 1 - int(self.positions[5:]))
        return at[:, None].expand_as(offsets)


def _first(valid: Tensor, order: Tensor) -> Tensor:
    """Return the position of the first token of each row, `[B]`; 0 where all are pads."""
    return torch.where(valid, order, 1 << 40).amin(1).masked_fill(~valid.any(1), 0)
