"""One layer's part of the local context: its window.

A layer follows the columns of the cache's window (`physical` of them, `dropped` before them) and holds their K-V. A
TOVA layer (tova.py) holds other tokens than the window.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from model_worker.attachment.hf_caches import DynamicLayer
from model_worker.attachment.rope import Rope
from model_worker.window.growing import Growing


class LocalLayer(DynamicLayer):
    """The local window of one layer, with keys (and queries) before RoPE beside the rotated ones where asked."""

    is_croppable = False  # what has left the window cannot be rolled back to
    is_initialized: bool
    keys: Tensor
    values: Tensor
    parts: ClassVar[tuple[str, ...]] = ("keys", "values", "raw_keys", "raw_queries")

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        self.raw_keys: Tensor | None = None
        self.raw_queries: Tensor | None = None
        self._growing = {name: Growing() for name in LocalLayer.parts}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, Hkv, Q, D]`, and return all that are held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._growing["keys"].behind(self.keys, key_states)
        self.values = self._growing["values"].behind(self.values, value_states)
        return self.keys, self.values

    @property
    def physical(self) -> int:
        """Return the number of tokens in the window."""
        return super().get_seq_length()

    @property
    def held(self) -> int:
        """Return the number of tokens that the next forward attends to."""
        return super().get_seq_length()

    @property
    def window_values(self) -> Tensor:
        """Return the values of the window's tokens, `[B, Hkv, physical, D]`."""
        return self.values

    def get_seq_length(self) -> int:
        """Return the logical length, which counts all tokens ever seen."""
        return self.dropped + self.physical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.physical + query_length, self.dropped

    def drop(self, count: int) -> None:
        """Forget the oldest `count` tokens."""
        self.dropped += count
        self._cut(self.parts, count)

    def _cut(self, names: tuple[str, ...], count: int) -> None:
        """Drop the oldest `count` tokens of the tensors that are called `names`."""
        for name in names:
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel():
                setattr(self, name, tensor[:, :, count:].contiguous())

    def take_sinks(self, rope: Rope, positions: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys before RoPE and values, `[B, Hkv, n, D]`, of the window's oldest n tokens.

        positions: `[B, n]`, where RoPE has put them. chosen: bool `[B, n]`, which of them are sinks, which are held
        elsewhere from now on.
        """
        count = positions.shape[1]
        keys, values = self.keys[:, :, :count], self.values[:, :, :count]
        if self.raw_keys is not None:
            return self.raw_keys[:, :, :count], values
        return (rope.unrotate(keys, *rope.cos_sin(positions)) if rope.rotates else keys), values

    def keep_raw(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> None:
        """Append unrotated keys `[B, Hkv, Q, D]` and queries `[B, Hq, Q, D]` of the running forward."""
        self.raw_keys = self._growing["raw_keys"].behind(self.raw_keys, keys)
        if queries is not None:
            self.raw_queries = self._growing["raw_queries"].behind(self.raw_queries, queries)

    def move(self, rope: Rope, positions: Tensor, delta: int) -> None:
        """Shift the rotated keys back by `delta`; `positions` `[B, physical]` are the window's before the shift."""
        self.keys = rope.move(self.keys, positions, positions - delta)

    def settle(self) -> None:
        """Put what is held in the order of its positions, in tensors that no later forward writes to."""

    def clear(self) -> None:
        """Forget what is held besides the window, which was emptied for good."""

    def restore(self, parts: dict[str, Tensor], columns: int) -> None:
        """Put the tensors of a state into this fresh layer; `columns` of the window are followed."""
        self.lazy_initialization(parts["keys"], parts["values"])
        for name in self.parts:
            setattr(self, name, parts.get(name))

    def reset(self) -> None:
        super().reset()
        self.dropped, self.raw_keys, self.raw_queries = 0, None, None


def append(old: Tensor | None, new: Tensor) -> Tensor:
    """Return `new` `[B, H, Q, ...]` behind `old`, if there is one."""
    return new if old is None else torch.cat([old, new], dim=2)
