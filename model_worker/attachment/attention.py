"""One joint softmax over retrieved and local keys: retrieval-causal attention (MemLong, section 3.3 of the paper).

`retrieval_causal_attention` is a pure function around the model's own attention backend: retrieved keys are put in
front of the local ones, and the mask grows by columns that every query may see. Deviations from MemLong's release:
retrieved K-V heads are expanded like local ones (its code has no grouped heads), and rows of a batch may retrieve
different lengths.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.model_parts import layer_of

Backend = Callable[..., tuple[Tensor, Tensor | None]]
# How many tokens may be decoded before the room for them is made anew.
_SPARE = 64


@dataclass(frozen=True, slots=True)
class RetrievedKV:
    """The K-V that one layer attends to besides its local context.

    keys, values: `[B, Hkv, R, D]`, keys rotated to their positions.
    valid: bool `[B, R]`, false where a shorter row is padded; None when nothing is padded.
    gate: `[Hq]` in (0, 1), or `[B, Hq]`, or None. MemLong's optional gate: memory scores times g, local scores times
    1 - g; a row whose gate is 0 must have no memory.
    sinks: how many of the first tokens are sinks, which count as local for the gate.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None
    gate: Tensor | None = None
    sinks: int = 0
    # What `_behind` has put together, by layer; a copy with other keys has it too.
    rooms: dict[int, "_Room"] = field(default_factory=dict, repr=False, compare=False)


@dataclass(slots=True)
class _Room:
    """Keys and values of one layer, with room behind them. memory: the retrieved keys that stand in front. local: the
    local keys and values behind these."""

    keys: Tensor
    values: Tensor
    memory: Tensor | None = None
    local: tuple[Tensor, Tensor] | None = None


def retrieval_causal_attention(
    backend: Backend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    retrieved: RetrievedKV | None,
    *,
    grows: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to `retrieved` and the local keys in one softmax.

    query `[B, Hq, Q, D]`, key and value `[B, Hkv, L, D]` after RoPE; mask as the backend takes it (bool or additive,
    `[B or 1, 1, Q, L]`) or None. grows: whether local keys and values that lie in the same place as those of a call
    before begin with these, unchanged. Returns the backend's `([B, Q, Hq, D], weights or None)`. Without `retrieved`
    the call is the backend's own, bit for bit.
    """
    if retrieved is None:
        return backend(module, query, key, value, mask, **kwargs)
    mask = _grow_mask(mask, retrieved.valid, query, key, retrieved.keys.shape[2])
    if query.shape[2] == 1 and retrieved.gate is None and not torch.is_grad_enabled():
        return backend(module, query, *_behind(retrieved, layer_of(module), (key, value), grows), mask, **kwargs)
    memory_keys, memory_values = retrieved.keys.to(key.dtype), retrieved.values.to(value.dtype)
    if retrieved.gate is not None:
        module, key, value, memory_keys, memory_values = _gated(
            module, query.shape[1], retrieved, key, value, memory_keys, memory_values
        )
    key, value = torch.cat([memory_keys, key], dim=2), torch.cat([memory_values, value], dim=2)
    return backend(module, query, key, value, mask, **kwargs)


def _behind(retrieved: RetrievedKV, layer: int, local: tuple[Tensor, Tensor], grows: bool) -> tuple[Tensor, Tensor]:
    """Put local keys and values behind the retrieved ones, which stay where the step before has put them.

    Copying a thousand retrieved tokens for each token that is decoded would cost as much as attending to them, and so
    would the local ones of a small model. The room takes the memory of one concatenation a layer, for as long as the
    same is retrieved; keys that moved are copied, values not. local, grows: see `retrieval_causal_attention`.
    """
    memory, room = retrieved.keys.shape[2], retrieved.rooms.get(layer)
    end = memory + local[0].shape[2]
    if room is None or room.keys.shape[2] < end or _kind(room.keys) != _kind(local[0]):
        keys, values = (x.new_empty((*x.shape[:2], end + _SPARE, x.shape[3])) for x in local)
        room = _Room(keys, values)
        room.values[:, :, :memory] = retrieved.values
        retrieved.rooms[layer] = room
    if room.memory is not retrieved.keys:
        room.keys[:, :, :memory] = room.memory = retrieved.keys
    stand = room.local if grows else None
    for at, (whole, new) in enumerate(zip((room.keys, room.values), local, strict=True)):
        begin = 0 if stand is None or stand[at].data_ptr() != new.data_ptr() else stand[at].shape[2]
        whole[:, :, memory + begin : end] = new[:, :, begin:]
    room.local = local  # while these are held, nothing else lies in their place
    return room.keys[:, :, :end], room.values[:, :, :end]


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """Return what must be alike in two tensors for the one to be written into the other's room."""
    return tensor.shape[0], tensor.dtype, tensor.device, tensor.is_inference()


def _grow_mask(mask: Tensor | None, valid: Tensor | None, query: Tensor, key: Tensor, memory: int) -> Tensor | None:
    """Return the mask with `memory` columns in front, which all queries see where `valid` (None: everywhere)."""
    queries, length = query.shape[2], key.shape[2]
    if mask is None and queries == 1 and valid is None:
        return None
    if mask is None:
        # Never None here: sdpa would take the keys for an empty static cache and keep only the first ones.
        mask = torch.ones(queries, length, dtype=torch.bool, device=key.device).tril(length - queries)[None, None]
    rows = query.shape[0]
    front = torch.ones(rows, memory, dtype=torch.bool, device=key.device) if valid is None else valid
    front = front[:, None, None, :].expand(rows, mask.shape[1], queries, memory)
    if mask.dtype != torch.bool:
        front = torch.zeros(front.shape, dtype=mask.dtype, device=key.device).masked_fill(
            ~front, torch.finfo(mask.dtype).min
        )
    return torch.cat([front, mask.expand(rows, -1, -1, -1)], dim=-1)


def _gated(
    module: nn.Module, query_heads: int, retrieved: RetrievedKV, key: Tensor, value: Tensor, *memory: Tensor
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """Return module, keys and values with the gate in the keys, since scores are linear in them.

    memory: keys and values of what was retrieved. The gate is per query head, so that keys and values are expanded
    first, and the module says that they are.
    """
    assert retrieved.gate is not None
    groups = query_heads // key.shape[1]
    key, value, memory_keys, memory_values = (x.repeat_interleave(groups, dim=1) for x in (key, value, *memory))
    gate = retrieved.gate.to(key.dtype)
    gate = (gate if gate.ndim == 2 else gate[None])[:, :, None, None]
    expanded = SimpleNamespace(
        num_key_value_groups=1, is_causal=True, training=module.training, layer_idx=getattr(module, "layer_idx", None)
    )
    sinks, recalled = memory_keys[:, :, : retrieved.sinks], memory_keys[:, :, retrieved.sinks :]
    memory_keys = torch.cat([sinks * (1 - gate), recalled * gate], dim=2)
    return expanded, key * (1 - gate), value, memory_keys, memory_values
