"""What travels through a tree: tokens with their states, how two halves become one, and which tokens go on.

All of it is arithmetic on tensors; no model is run here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Tokens:
    """The tokens of a node: context tokens, then `suffix` suffix tokens.

    hidden `[n, hidden]`; positions `[n]` in RoPE; origins `[n]`, index in the whole input. keys (before RoPE) and
    values of the finished layers that are wanted, `[Hkv, n, D]` each. significance `[n]`: the last one measured, where
    a later node may need it.
    """

    hidden: Tensor
    positions: Tensor
    origins: Tensor
    suffix: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    significance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The tokens that stand before every leaf, at positions 0 to P-1; keys before RoPE, `[Hkv, P, D]` by layer."""

    hidden: Tensor
    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]

    def __len__(self) -> int:
        return self.hidden.shape[0]


def survivors(significance: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` most significant tokens, ascending; among equals the earlier one is dropped."""
    order = torch.sort(significance, stable=True).indices
    return order[len(significance) - count :].sort().values


def pick(tokens: Tokens, keep: Tensor) -> Tokens:
    """Return the tokens at `keep`, in every finished layer: the paper's propagative refinement.

    This takes `tokens` apart, so that no more than one layer is held twice.
    """
    return Tokens(
        tokens.hidden[keep],
        tokens.positions[keep],
        tokens.origins[keep],
        tokens.suffix,
        {layer: tokens.keys.pop(layer)[:, keep] for layer in list(tokens.keys)},
        {layer: tokens.values.pop(layer)[:, keep] for layer in list(tokens.values)},
        None if tokens.significance is None else tokens.significance[keep],
    )


def merge(left: Tokens, right: Tokens, *, consume: bool = False) -> Tokens:
    """Return both contexts, one behind the other at the positions they have, and the mean of the two suffixes.

    consume: take both halves apart, so that no more than one layer is held twice.
    """

    def join(a: Tensor, b: Tensor, dim: int = 0) -> Tensor:
        (a, a_tail), (b, b_tail) = (torch.split(x, [x.shape[dim] - left.suffix, left.suffix], dim) for x in (a, b))
        return torch.cat([a, b, (a_tail + b_tail) / 2], dim)

    def follow(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a[: len(a) - left.suffix], b])

    def layers(a: dict[int, Tensor], b: dict[int, Tensor]) -> dict[int, Tensor]:
        take = dict.pop if consume else dict.__getitem__
        return {layer: join(take(a, layer), take(b, layer), 1) for layer in list(a)}

    a, b = left.significance, right.significance
    return Tokens(
        join(left.hidden, right.hidden),
        follow(left.positions, right.positions),
        follow(left.origins, right.origins),
        left.suffix,
        layers(left.keys, right.keys),
        layers(left.values, right.values),
        None if a is None or b is None else follow(a, b),
    )
