"""What one layer keeps of the local context: the window, or the tokens that TOVA chooses.

A layer follows the columns of the cache's window (`physical` of them, `dropped` before them). `LocalLayer` holds their
K-V; `TovaLayer` holds the K-V of at most m tokens, of whatever age, and the window only for what the memory captures.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from model_worker.rope import Rope
from model_worker.selection import gather, kept_positions, over_heads, received


class LocalLayer(DynamicLayer):
    """One layer's local window. Keeps unrotated keys (and queries) beside the rotated ones where asked."""

    is_croppable = False  # what has left the window cannot be rolled back to
    keys: Tensor
    values: Tensor
    parts: ClassVar[tuple[str, ...]] = ("keys", "values", "raw_keys", "raw_queries")

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        self.raw_keys: Tensor | None = None
        self.raw_queries: Tensor | None = None

    @property
    def physical(self) -> int:
        """Tokens in the window."""
        return super().get_seq_length()

    @property
    def held(self) -> int:
        """Tokens that the next forward attends to."""
        return super().get_seq_length()

    @property
    def window_values(self) -> Tensor:
        """Values of the window's tokens `[B, Hkv, physical, D]`."""
        return self.values

    def get_seq_length(self) -> int:
        """Logical length: all tokens ever seen."""
        return self.dropped + self.physical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.physical + query_length, self.dropped

    def drop(self, count: int) -> None:
        """Forget the oldest `count` tokens."""
        self.dropped += count
        self._cut(self.parts, count)

    def _cut(self, names: tuple[str, ...], count: int) -> None:
        for name in names:
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel():
                setattr(self, name, tensor[:, :, count:].contiguous())

    def keep_raw(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> None:
        """Append unrotated keys `[B, Hkv, Q, D]` and queries `[B, Hq, Q, D]` of the running forward."""
        self.raw_keys = _append(self.raw_keys, keys)
        if queries is not None:
            self.raw_queries = _append(self.raw_queries, queries)

    def move(self, rope: Rope, positions: Tensor, delta: int) -> None:
        """Shift the rotated keys back by `delta`; `positions` `[B, physical]` are the window's before the shift."""
        self.keys = rope.move(self.keys, positions, positions - delta)

    def clear(self) -> None:
        """Called when the window was emptied for good."""

    def restore(self, parts: dict[str, Tensor], columns: int) -> None:
        """Put the tensors of a state into this fresh layer; `columns` of the window are followed."""
        self.lazy_initialization(parts["keys"], parts["values"])
        for name in self.parts:
            setattr(self, name, parts.get(name))

    def reset(self) -> None:
        super().reset()
        self.dropped, self.raw_keys, self.raw_queries = 0, None, None


@dataclass(frozen=True, slots=True)
class TovaRule:
    """What a TOVA layer keeps: the `m` tokens that the last `last` queries of each forward attend to most.

    heads: `shared` (mean over all query heads, one set a layer: the paper's rule) or `own` (one set a K-V head).
    """

    m: int
    last: int = 1
    heads: str = "shared"

    @property
    def spec(self) -> str:
        """How to ask for it, e.g. `tova:m=64`."""
        observer = {1: "", 1 << 30: ",observer=all"}.get(self.last, f",observer=window:{self.last}")
        return f"tova:m={self.m}{observer}" + ("" if self.heads == "shared" else f",heads={self.heads}")

    def keep(self, query: Tensor, key: Tensor, scaling: float, valid: Tensor | None = None) -> Tensor:
        """Indices `[B, 1 or Hkv, m]` into the keys, ascending; pads (not `valid`) leave first."""
        scores = over_heads(received(query, key, scaling, valid, self.last), key.shape[1], self.heads)
        if valid is not None:
            scores = scores.masked_fill(~valid, -1.0)
        return kept_positions(scores, self.m)


class TovaLayer(LocalLayer):
    """The cache of one layer under TOVA at decode time (arXiv 2401.06104, section 3.2; the authors' cache class).

    Each forward attends to all that is held and to itself; then, if more than m tokens are held, the m with the largest
    attention weight from its last query stay. Keys stay at their positions, so gaps remain.
    Deviations: float32 scores, ties to the later token, one set a batch row with pads leaving first (the authors' code
    is right for one row only), and recalled memory takes no part in the scores.
    """

    parts = (*LocalLayer.parts, "recent_values", "positions", "valid")

    def __init__(self, rule: TovaRule) -> None:
        super().__init__()
        self.rule = rule
        self._followed = 0
        self.recent_values: Tensor | None = None
        self.positions: Tensor | None = None  # [B, 1 or Hkv, held]: where the held keys are rotated to
        self.valid: Tensor | None = None  # the same shape; false for pads
        self._room: tuple[Tensor, Tensor] | None = None  # held K-V with a free last column, and
        self._before: Tensor | None = None  # the keys that stand in front of it

    @property
    def physical(self) -> int:
        return self._followed

    @property
    def window_values(self) -> Tensor:
        assert self.recent_values is not None
        return self.recent_values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._followed += key_states.shape[2]
        room, self._room = self._room, None
        if room is None or self.keys is not self._before or key_states.shape[2] != 1:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = room
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def keep_raw(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> None:
        super().keep_raw(keys, values, queries)
        self.recent_values = _append(self.recent_values, values)

    def follow(self, positions: Tensor, valid: Tensor) -> Tensor | None:
        """Note position and kind of the new tokens `[B, Q]`. Returns who may see whom, `[B, 1 or Hkv, Q, L]`.

        None when the layer held nothing (the model's own mask is right), or when one query may see everything.
        """
        new = positions.shape[1]
        before = 0 if self.positions is None else self.positions.shape[2]
        heads = 1 if self.positions is None else self.positions.shape[1]
        positions, valid = (x[:, None].expand(-1, heads, -1) for x in (positions, valid))
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=2)
        self.valid = valid if self.valid is None else torch.cat([self.valid, valid], dim=2)
        if before == 0 or (new == 1 and bool(self.valid.all())):
            return None
        causal = torch.ones(new, before + new, dtype=torch.bool, device=valid.device).tril(before)
        seen = causal & self.valid[:, :, None]
        own = torch.eye(new, before + new, dtype=torch.bool, device=valid.device).roll(before, dims=1)
        return seen | own  # a pad sees at least itself: a row of nothing but minus infinity has no softmax

    def reduce(self, query: Tensor, scaling: float) -> None:
        """Keep what the rule says, given this forward's rotated queries `[B, Hq, Q, D]`."""
        assert self.positions is not None
        assert self.valid is not None
        if self.held <= self.rule.m:
            return
        valid = None if bool(self.valid.all()) else self.valid
        keep = self.rule.keep(query, self.keys, scaling, valid)
        self._take(keep, spare=query.shape[2] == 1 and not torch.is_grad_enabled())
        self.positions = self.positions.expand(-1, keep.shape[1], -1).gather(2, keep)
        self.valid = self.valid.expand(-1, keep.shape[1], -1).gather(2, keep)

    def _take(self, keep: Tensor, spare: bool) -> None:
        """Hold the tokens `keep` only; while decoding with a spare column, so that the next token costs no copy."""
        columns = torch.cat([keep, keep[..., -1:]], dim=2) if spare else keep
        keys, values = gather(self.keys, columns), gather(self.values, columns)
        self._room = (keys, values) if spare else None
        self.keys, self.values = keys[:, :, : keep.shape[2]], values[:, :, : keep.shape[2]]
        self._before = self.keys

    def drop(self, count: int) -> None:
        """The window moves on; what is held stays."""
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
        self.positions = self.valid = None

    def restore(self, parts: dict[str, Tensor], columns: int) -> None:
        super().restore(parts, columns)
        self._followed = columns

    def reset(self) -> None:
        super().reset()
        self._followed = 0
        self._room = self._before = None
        self.recent_values = self.positions = self.valid = None


def _append(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], dim=2)
