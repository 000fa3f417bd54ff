"""One layer's part of the local context under TOVA: at most m tokens, of whatever age, chosen by attention.

The layer follows the cache's window too, for what the memory captures, but attends to the tokens that it holds.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_worker.attachment.rope import Rope
from model_worker.window.local import LocalLayer, append
from model_worker.window.selection import gather, kept_positions, lowest, over_heads


@dataclass(frozen=True, slots=True)
class TovaRule:
    """The rule of a TOVA layer: it keeps the `m` tokens that the last `last` queries of each forward attend to most.

    heads: `shared` (mean over all query heads, one set a layer: the paper's rule) or `own` (one set a K-V head).
    """

    m: int
    last: int = 1
    heads: str = "shared"

    @property
    def spec(self) -> str:
        """Say how to ask for the rule, e.g. `tova:m=64`."""
        observer = {1: "", 1 << 30: ",observer=all"}.get(self.last, f",observer=window:{self.last}")
        return f"tova:m={self.m}{observer}" + ("" if self.heads == "shared" else f",heads={self.heads}")

    def scores(self, weights: Tensor, kv_heads: int, valid: Tensor | None = None) -> Tensor:
        """Return scores `[B, 1 or Hkv, L]` from the observers' weights `[B, Hq, L]`; pads (not `valid`) leave first."""
        scores = over_heads(weights, kv_heads, self.heads)
        return scores if valid is None else scores.masked_fill(~valid, -1.0)


class TovaLayer(LocalLayer):
    """The cache of one layer under TOVA at decode time (arXiv 2401.06104, section 3.2; the authors' cache class).

    Each forward attends to all that is held and to itself; then, if more than m tokens are held, the m with the largest
    attention weight from its last query stay. Keys stay at their positions, so gaps remain.
    Deviations: float32 scores, ties to the later token, one set a batch row with pads leaving first (the authors' code
    is right for one row only), and recalled memory takes no part in the scores.

    Where one token came and one leaves, the new one takes the other's place, and nothing else moves. What is held is
    then in no order, which attention does not see, until `settle`.
    """

    parts = (*LocalLayer.parts, "recent_values", "positions", "valid")

    def __init__(self, rule: TovaRule) -> None:
        super().__init__()
        self.rule = rule
        self._followed = 0
        self.recent_values: Tensor | None = None
        self.positions: Tensor | None = None  # [B, 1 or Hkv, held]: where the held keys are rotated to
        self.valid: Tensor | None = None  # the same shape; false for pads; None without pads
        self._room: tuple[Tensor, Tensor] | None = None  # out of order: held K-V and a free last column, and
        self._before: Tensor | None = None  # the keys that stand in front of it

    @property
    def physical(self) -> int:
        return self._followed

    @property
    def overfull(self) -> bool:
        """Tell whether more is held than the rule allows, so that `reduce` is due."""
        return self.held > self.rule.m

    @property
    def window_values(self) -> Tensor:
        assert self.recent_values is not None
        return self.recent_values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._followed += key_states.shape[2]
        if self._room is None or key_states.shape[2] > 1 or not self._may_write():
            self.settle()
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self._room
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def _may_write(self) -> bool:
        """Tell whether `keys` is still the view of the room that `_replace` left, and torch lets this forward write."""
        kept = self.keys is self._before and self.keys.is_inference() == torch.is_inference_mode_enabled()
        return kept and not torch.is_grad_enabled()

    def keep_raw(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> None:
        super().keep_raw(keys, values, queries)
        self.recent_values = append(self.recent_values, values)

    def follow(self, positions: Tensor, valid: Tensor | None) -> Tensor | None:
        """Note the positions of new tokens `[B, Q]` and which are `valid` (None: all), and return who may see whom.

        The mask is `[B or 1, 1 or Hkv, Q, L]`, or None when the layer held nothing (the model's own mask is right), or
        when one query may see everything.
        """
        heads, before = (1, 0) if self.positions is None else self.positions.shape[1:]
        new, positions = positions.shape[1], positions[:, None].expand(-1, heads, -1)
        if valid is not None or self.valid is not None:
            valid = _all_true(positions) if valid is None else valid[:, None].expand(-1, heads, -1)
            if self.valid is None and self.positions is not None:
                self.valid = _all_true(self.positions)
            self.valid = append(self.valid, valid)
        self.positions = append(self.positions, positions)
        if before == 0 or (new == 1 and self.valid is None):
            return None
        causal = torch.ones(new, before + new, dtype=torch.bool, device=positions.device).tril(before)
        if self.valid is None:
            return causal[None, None]
        own = torch.eye(new, before + new, dtype=torch.bool, device=positions.device).roll(before, dims=1)
        return causal & self.valid[:, :, None] | own  # a pad sees at least itself: nothing but -inf has no softmax

    def reduce(self, weights: Tensor, new: int, sinks: Tensor | None = None) -> None:
        """Keep what the rule says of the observers' attention weights `[B, Hq, held]`; `new` tokens came last.

        sinks: `[B]`, the position before which tokens are sinks, which stay; None where there are none.
        """
        scores = self.rule.scores(weights, self.keys.shape[1], self.valid)
        if sinks is not None:
            assert self.positions is not None
            stay = self.positions < sinks[:, None, None]
            scores = scores.masked_fill(stay if self.valid is None else stay & self.valid, torch.inf)
        if new == 1 and self.held == self.rule.m + 1 and not torch.is_grad_enabled():
            assert self.positions is not None
            self._replace(lowest(scores, self.positions))
        else:
            self._take(kept_positions(scores, self.rule.m))
        if self.valid is not None and bool(self.valid.all()):
            self.valid = None

    def take_sinks(self, rope: Rope, positions: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `LocalLayer.take_sinks` does; the layer attends no more to those that are `chosen`.

        They are held, since `reduce` keeps sinks; what is returned for other tokens of the window means nothing.
        """
        self.settle()
        assert self.positions is not None
        heads = self.keys.shape[1]
        same = (self.positions[:, :, :, None] == positions[:, None, None]) & chosen[:, None, None]
        if self.valid is not None:
            same = same & self.valid[..., None]
        slots = same.int().argmax(dim=2).expand(-1, heads, -1)
        keys, values = gather(self.keys, slots), gather(self.values, slots)
        valid = _all_true(self.positions) if self.valid is None else self.valid
        self.valid = valid & ~same.any(dim=3)
        if rope.rotates:
            keys = rope.unrotate(keys, *rope.cos_sin(positions))
        return keys, values

    def _replace(self, slot: Tensor) -> None:
        """Put the newest token where the one in `slot` `[B, 1 or Hkv, 1]` was; its own column is free then.

        `update` made these tensors, or owns them, so that no other holder sees the change.
        """
        assert self.positions is not None
        rows, heads, _, dim = self.keys.shape
        self._room = self.keys, self.values
        for whole in self._room:
            whole.scatter_(2, slot[..., None].expand(rows, heads, 1, dim), whole[:, :, -1:].clone())
        self.keys, self.values = (whole[:, :, :-1] for whole in self._room)
        self._before = self.keys
        self.positions = _moved(self.positions, slot)
        self.valid = None if self.valid is None else _moved(self.valid, slot)

    def _take(self, keep: Tensor) -> None:
        """Hold the tokens `keep` `[B, 1 or Hkv, m]` only, in this order, in new tensors."""
        assert self.positions is not None
        self.keys, self.values = gather(self.keys, keep), gather(self.values, keep)
        self.positions = self.positions.expand(-1, keep.shape[1], -1).gather(2, keep)
        self.valid = None if self.valid is None else self.valid.expand(-1, keep.shape[1], -1).gather(2, keep)
        self._room = self._before = None

    def settle(self) -> None:
        if self._room is not None:
            assert self.positions is not None
            self._take(self.positions.argsort(dim=2, stable=True))

    def drop(self, count: int) -> None:
        """Let the window move on by `count` tokens; what is held stays."""
        self.dropped += count
        self._followed -= count
        self._cut(("raw_keys", "raw_queries", "recent_values"), count)

    def move(self, rope: Rope, positions: Tensor, delta: int) -> None:
        assert self.positions is not None
        self.keys = rope.move(self.keys, self.positions, self.positions - delta)
        self.positions = self.positions - delta

    def clear(self) -> None:
        if self.held:
            self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]
        self.positions = self.valid = self._room = self._before = None

    def restore(self, parts: dict[str, Tensor], columns: int) -> None:
        super().restore(parts, columns)
        self._followed = columns

    def reset(self) -> None:
        super().reset()
        self._followed = 0
        self._room = self._before = None
        self.recent_values = self.positions = self.valid = None


def _all_true(like: Tensor) -> Tensor:
    """Return a mask of the shape of `like` that leaves out nothing."""
    return torch.ones_like(like, dtype=torch.bool)


def _moved(columns: Tensor, slot: Tensor) -> Tensor:
    """Return `columns` `[B, 1 or H, L]` without the last one, which goes into `slot` `[B, 1 or H, 1]`."""
    columns = columns.expand(-1, slot.shape[1], -1)
    return columns.scatter(2, slot, columns[:, :, -1:])[:, :, :-1]
