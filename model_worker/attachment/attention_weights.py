"""The weights of an attention, for someone who wants to see what a layer attends to: fast backends return none.

This file owns that the weights are those of the model's own file: its eager attention is asked, which knows of soft
caps and of sinks that are parameters.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.backends import own_attention

_BLOCK = 256  # queries whose weights are held at once
# What eager attention adds to the scores of each query head by itself, so that heads cannot be put together.
_OF_HEADS = ("s_aux", "position_bias", "head_mask")


def attention_weights(
    module: nn.Module, called: Any, query: Tensor, key: Tensor, mask: Tensor | None, **kwargs: Any
) -> Iterator[Tensor]:
    """Yield the softmax weights of some queries after the other, mean over the heads: `[B, Q, L]`, in float32.

    module: the attention of a decoder layer. called: what a backend is called with in the place of the module, which
    tells how many query heads share a K-V head. query `[B, Hq, Q, D]`, key `[B, Hkv, L, D]`, mask (as a backend takes
    it, or None) and kwargs: as a backend is called with them. Weights of one query sum to 1, and to less where the
    model has sinks that are parameters.
    """
    eager: Any = own_attention("eager", module)
    kwargs = {**kwargs, "dropout": 0.0}
    with torch.no_grad():
        query, key = query.float(), key.float()
        mask = _additive(mask, query.shape[2], key)
        values = key[..., :1]  # nobody reads the attention itself
        if query.shape[2] == 1 and _alike(module, mask, kwargs):
            # Heads of one group stand side by side as queries of one head: their keys are not copied for each of them.
            grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
            one = SimpleNamespace(num_key_value_groups=1, training=False)
            yield eager(one, grouped, key, values, mask, **kwargs)[1].flatten(1, 2).mean(1, keepdim=True)
            return
        for begin in range(0, query.shape[2], _BLOCK):
            part = slice(begin, begin + _BLOCK)
            seen = None if mask is None else mask[:, :, part]
            yield eager(called, query[:, :, part], key, values, seen, **kwargs)[1].mean(1)


def _additive(mask: Tensor | None, queries: int, key: Tensor) -> Tensor | None:
    """Return a mask as eager attention takes it. Without one several queries are causal, the last one sees all."""
    length = key.shape[2]
    if mask is None:
        if queries == 1:
            return None
        mask = torch.ones(queries, length, dtype=torch.bool, device=key.device).tril(length - queries)[None, None]
    if mask.dtype != torch.bool:
        return mask.float()
    hidden = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=key.device).masked_fill(~mask, hidden)


def _alike(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Tell whether all query heads that share a K-V head are treated alike."""
    own = hasattr(module, "sinks") or any(kwargs.get(name) is not None for name in _OF_HEADS)
    return not own and (mask is None or mask.shape[1] == 1)
