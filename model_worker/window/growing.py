"""A tensor of a window that grows by a token at a time, without a copy of what it has for each of them."""

import torch
from torch import Tensor

# How many tokens may come in before the room for them is made anew.
_SPARE = 64


class Growing:
    """The room of one tensor `[B, H, n, D]`: what `behind` returned last stands at its beginning."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._last: Tensor | None = None

    def behind(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Return `new` `[B, H, Q, D]` behind `old`, if there is one.

        A single token for which no gradient is kept is written into the room, where `old` is what was returned last.
        Nothing that was returned before changes.
        """
        if old is None or not old.numel():
            return new
        if new.shape[2] > 1 or torch.is_grad_enabled() or old.dtype != new.dtype:
            return torch.cat([old, new], dim=2)
        length, whole = old.shape[2], self._whole
        if whole is None or self._last is not old or whole.shape[2] == length or whole.is_inference() != _inference():
            whole = old.new_empty((*old.shape[:2], length + _SPARE, old.shape[3]))
            whole[:, :, :length] = old
        whole[:, :, length : length + 1] = new
        self._whole, self._last = whole, whole[:, :, : length + 1]
        return self._last


def _inference() -> bool:
    return torch.is_inference_mode_enabled()
