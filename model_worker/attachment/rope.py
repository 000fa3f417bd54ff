"""The rotary positions of one layer, by the model's own functions.

Keys are stored before RoPE, so that a chunk can be attended to at any position. This module owns the two directions:
`rotate` puts unrotated keys at given positions, `unrotate` takes the rotation of a forward back. Both call the
`apply_rotary_pos_emb` of the model's own file, so that half-split, interleaved and partial layouts need no code here.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.errors import InputError


def rotation_limit(config: Any) -> int | None:
    """Return the first position at which a model rotates all positions otherwise than before; None when it never does.

    With longrope and dynamic scaling the angles follow the length of the input too: keys that were rotated below the
    limit do not belong to queries beyond it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = []
    for part in kinds:
        if part.get("rope_type") == "longrope":
            limits.append(part.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        elif part.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings - 1)  # the last one may find what a longer input left
    return min(limits, default=None)


class Rope:
    """The rotation as one attention module applies it.

    rotary: the module that makes cosines and sines; None for a layer without rotation (NoPE). layer_type: for which of
    several bases, where the model has more than one. limit: positions from there on are refused (see `rotation_limit`).
    """

    def __init__(
        self,
        attention: nn.Module,
        rotary: nn.Module | None,
        layer_type: str | None = None,
        limit: int | None = None,
    ):
        self._apply: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._rotary = rotary
        self._limit = limit
        self._layer_type = None
        self._slice = False
        if rotary is not None:
            self._apply = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
            if "layer_type" in inspect.signature(rotary.forward).parameters:  # several bases in one model (Gemma 3)
                self._layer_type = layer_type

    @property
    def key(self) -> object:
        """Return a key that is equal for layers that rotate alike, so that one rotated block serves them all."""
        return (id(self._rotary), self._layer_type)

    @property
    def rotates(self) -> bool:
        """Tell whether the layer rotates at all; a layer without positions (NoPE) does not."""
        return self._rotary is not None

    @property
    def limited(self) -> bool:
        """Tell whether the rotation changes at some position."""
        return self._limit is not None

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines in float32 for `positions` `[B, T]`, in the layout of the model.

        Raises InputError beyond the limit.
        """
        assert self._rotary is not None
        if self._limit is not None:
            check_below(self._limit, positions)
        probe = torch.empty(0, dtype=torch.float32, device=positions.device)
        extra = () if self._layer_type is None else (self._layer_type,)
        cos, sin = self._rotary(probe, positions, *extra)
        return cos.float(), sin.float()

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Put unrotated `keys` `[B, H, T, D]` at `positions` `[B, T]`; same dtype, computed in float32, rounded once.

        positions: `[B, 1]` where all tokens of a row have one, `[B, H, T]` where each head has its own. They may be
        negative: RoPE depends on differences only.
        """
        if self._rotary is None:
            return keys
        if positions.ndim == 3:
            return _by_head(self.rotate, keys, positions)
        return self._turn(keys.float(), *self.cos_sin(positions)).to(keys.dtype)

    def crossed(self, keys: Tensor) -> Tensor:
        """Return what of the rotation of `keys` `[B, H, T, D]` in float32 is multiplied by sines: the numbers of each
        key in another order, some negative, and 0 for those that are not rotated."""
        none, one = (torch.full((1, 1, self._width(keys)), float(value), device=keys.device) for value in (0, 1))
        return self._turn(keys, none, one) - self._turn(keys, none, none)

    def factors(self, positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return by what numbers of keys, and of what `crossed` returns for these, are multiplied so that their sum is
        rotated to `positions` `[B, T]`: both `[B, T, D]` in float32, in the order of the numbers of a key.

        dim: D, of a head.
        """
        cos, sin = self.cos_sin(positions)
        none, one = torch.zeros_like(cos), torch.ones(1, 1, 1, dim, device=positions.device)
        ones = one.expand(len(cos), 1, cos.shape[1], dim)
        sines = self._turn(ones, none, sin) - self._turn(ones, none, none)
        return self._turn(ones, cos, none)[:, 0], (sines * self.crossed(one))[:, 0]

    def _width(self, keys: Tensor) -> int:
        """Return how many numbers the angles of one position have, which are those of a key or fewer."""
        return self.cos_sin(torch.zeros(1, 1, dtype=torch.long, device=keys.device))[0].shape[-1]

    def unrotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Take the forward's rotation back, exactly; `cos` and `sin` are as that layer received them.

        The divisor cos^2 + sin^2 matters where the model folds a scale into them (YaRN).
        """
        if self._rotary is None:
            return keys
        cos, sin = cos.float(), sin.float()
        ones = torch.ones_like(keys[:1, :1], dtype=torch.float32).expand(cos.shape[0], 1, -1, -1)
        scale = self._turn(self._turn(ones, cos, sin), cos, -sin)
        return (self._turn(keys.float(), cos, -sin) / scale).to(keys.dtype)

    def move(self, keys: Tensor, positions: Tensor, to: Tensor) -> Tensor:
        """Move rotated `keys` from `positions` `[B, T]` or `[B, H, T]` to the positions `to`; rounded once."""
        if self._rotary is None:
            return keys
        if positions.ndim == 3:
            return _by_head(self.move, keys, positions, to)
        return self.rotate(self.unrotate(keys.float(), *self.cos_sin(positions)), to).to(keys.dtype)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `x` `[B, H, T, D]` by the model's own function; of a partial rotation the rest stays as it is.

        That function rotates queries too, of which one head is given: what it returns for them is not used.
        """
        assert self._apply is not None
        if not self._slice:
            try:
                return self._apply(x[:, :1], x, cos, sin)[1]
            except RuntimeError:  # partial rotary done by the caller (Phi, StableLM): the angles are narrower
                if cos.shape[-1] >= x.shape[-1]:
                    raise
                self._slice = True
        width = cos.shape[-1]
        turned = self._apply(x[:, :1, :, :width], x[..., :width], cos, sin)[1]
        return torch.cat([turned, x[..., width:]], dim=-1)


def check_below(limit: int, positions: Tensor) -> None:
    """Raise InputError where the rotation of these positions would not be that of the keys in a cache."""
    if positions.numel() and int(positions.max()) >= limit:
        raise InputError(
            f"position {int(positions.max())} is not below {limit}, from where on this model rotates all positions "
            "otherwise (longrope, dynamic scaling): keys and queries would not fit; use a window that keeps below it"
        )


def _by_head(turn: Callable[..., Tensor], keys: Tensor, *positions: Tensor) -> Tensor:
    """Call `turn` with positions `[B, 1 or H, T]`: heads become rows of a batch."""
    if positions[0].shape[1] == 1:
        return turn(keys, *(p[:, 0] for p in positions))
    return turn(keys.flatten(0, 1)[:, None], *(p.flatten(0, 1) for p in positions)).view_as(keys)
