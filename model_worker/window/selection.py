"""The selection of the tokens that stay, by the attention that tokens receive. Pure functions.

Scores are float32 from the keys on, never rounded to the model's dtype: in bf16 every other cut would be a tie. Among
equal scores the later token stays.
"""

import torch
from torch import Tensor

_BLOCK = 256  # queries whose weights are held at once


def received(query: Tensor, key: Tensor, scaling: float, valid: Tensor | None = None, last: int = 1) -> Tensor:
    """Return the softmax weight that each key gets, mean over the `last` queries; `[B, Hq, L]`, float32.

    query `[B, Hq, Q, D]` and key `[B, Hkv, L, D]` are rotated and causal: the last query sees all keys, the one before
    it all but one. valid: bool `[B, 1 or Hkv, L]`, false for pads, which get no weight.
    """
    rows, heads, queries, _ = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    last = min(last, queries)
    key = key.float()
    total = torch.zeros(rows, heads, length, device=key.device)
    for begin in range(queries - last, queries, _BLOCK):
        block = query[:, :, begin : min(begin + _BLOCK, queries)].float()
        grouped = block.reshape(rows, kv_heads, -1, block.shape[-1])
        scores = (grouped @ key.transpose(2, 3)).view(rows, heads, block.shape[2], length) * scaling
        if last > 1:
            seen = torch.arange(length, device=key.device) <= _own_column(begin, block, queries, length)
            scores = scores.masked_fill(~seen, -torch.inf)
        if valid is not None:
            allowed = valid.repeat_interleave(heads // valid.shape[1], dim=1)[:, :, None]
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        total += torch.softmax(scores, dim=-1).sum(dim=2)
    return total / last


def weighed(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the attention of one query `[B, Hq, 1, D]`, and the weights `[B, Hq, L]` that `received` returns for it.

    key, value: `[B, Hkv, L, D]`. The attention is `[B, 1, Hq, D]`, as a backend gives it.
    """
    weights = received(query, key, scaling, valid)
    rows, heads, length = weights.shape
    grouped = weights.view(rows, value.shape[1], -1, length).to(value.dtype)
    return (grouped @ value).view(rows, 1, heads, -1), weights


def _own_column(begin: int, block: Tensor, queries: int, length: int) -> Tensor:
    """Return the column of each query of a block, `[Q, 1]`: the last key that it may see."""
    rows = torch.arange(begin, begin + block.shape[2], device=block.device)
    return (rows + length - queries)[:, None]


def over_heads(weights: Tensor, kv_heads: int, heads: str) -> Tensor:
    """Average `[B, Hq, L]` over all query heads (`shared`: `[B, 1, L]`) or by K-V head (`own`: `[B, Hkv, L]`)."""
    rows, _, length = weights.shape
    return weights.view(rows, 1 if heads == "shared" else kv_heads, -1, length).mean(dim=2)


def kept_positions(scores: Tensor, m: int) -> Tensor:
    """Return the positions of the `m` largest `scores` `[..., S]`, ascending; of equals the later; all when S <= m."""
    order = torch.sort(scores.flip(-1), dim=-1, descending=True, stable=True).indices[..., :m]
    return (scores.shape[-1] - 1 - order).sort(dim=-1).values


def lowest(scores: Tensor, positions: Tensor) -> Tensor:
    """Return the index `[..., 1]` of the token that leaves: of the smallest `scores` `[..., S]` the earliest.

    positions: of the tokens, of the same shape or one that expands to it; they may be in any order.
    """
    equal = scores <= scores.amin(dim=-1, keepdim=True)
    return torch.where(equal, positions, torch.iinfo(positions.dtype).max).argmin(dim=-1, keepdim=True)


def gather(tensor: Tensor, keep: Tensor) -> Tensor:
    """Take the tokens `keep` `[B, 1 or H, m]` of `tensor` `[B, H, L, D]`, copying whole rows, unlike torch.gather."""
    rows, heads, length, dim = tensor.shape
    first = torch.arange(rows * heads, device=keep.device).view(rows, heads, 1) * length
    chosen = tensor.reshape(-1, dim).index_select(0, (first + keep).reshape(-1))
    return chosen.view(rows, heads, keep.shape[2], dim)
