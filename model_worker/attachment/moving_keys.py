"""Keys that all stand at one position, which moves on with each token that is decoded.

To rotate a thousand keys anew for each token would cost more than to attend to them. A rotation is the keys times the
cosines plus the keys in another order times the sines: what depends on the keys alone is computed once here, and so are
the cosines and sines of the positions to come. The result is that of `Rope.rotate`, bit by bit.
"""

import torch
from torch import Tensor

from model_worker.attachment.rope import Rope

# How many positions are computed at once.
_AT_ONCE = 64


class MovingKeys:
    """Unrotated keys `[B, H, T, D]` of a layer, of which all of a row stand at one position.

    They take twice the memory of the keys in float32.
    """

    def __init__(self, rope: Rope, keys: Tensor):
        self._rope, self._dtype, self._plain = rope, keys.dtype, keys.float()
        self._crossed = rope.crossed(self._plain)
        self._first: Tensor | None = None  # the positions [B, 1] that the first cosines and sines are of
        self._cos = self._sin = torch.empty(0, 0)

    def at(self, positions: Tensor) -> Tensor:
        """Return the keys rotated to `positions` `[B, 1]`, in their dtype."""
        step = self._step(positions)
        cos, sin = (part[:, None, step : step + 1] for part in (self._cos, self._sin))
        turned = self._plain * cos
        turned += self._crossed * sin
        return turned.to(self._dtype)

    def _step(self, positions: Tensor) -> int:
        """Return how many positions stand between the first ones and these, for which there are cosines and sines."""
        if self._first is not None:
            steps = positions - self._first
            step = int(steps[0, 0])
            if 0 <= step < self._cos.shape[1] and (len(steps) == 1 or bool((steps == step).all())):
                return step
        # Where rotation has a limit, it depends on the positions that it is asked for: one at a time.
        count = 1 if self._rope.limited else _AT_ONCE
        self._first = positions
        to_come = positions + torch.arange(count, device=positions.device)
        self._cos, self._sin = self._rope.factors(to_come, self._plain.shape[-1])
        return 0
