"""TOVA, one-shot: keep the tokens that the chunk's last token attends to most (arXiv 2401.06104, section 3.2).

Deviations from the authors' code: scores stay in float32; among equal scores the later token wins (torch.topk leaves
it open); the chunk is reduced once, after one forward, which the paper does for prompts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from model_worker.capture import Captured, LayerCapture
from model_worker.compress.base import Payload
from model_worker.errors import InputError

if TYPE_CHECKING:
    from model_worker.attachment import Attachment


@dataclass(frozen=True)
class Tova:
    """m: tokens kept per layer."""

    m: int

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "TOVA, arXiv 2401.06104"
    cost: ClassVar[str] = "one query times the chunk's keys, per memory layer"
    needs_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.m < 1:
            raise InputError(f"tova keeps at least 1 token, not m={self.m}")

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        layers = {}
        for index, layer in captured.layers.items():
            keep = kept_positions(self.scores(layer, index, attachment), self.m)
            layers[index] = (layer.keys[:, keep], layer.values[:, keep], keep.to(torch.int32))
        return Payload(layers, f"tova:m={self.m}")

    def scores(self, layer: LayerCapture, index: int, attachment: "Attachment") -> Tensor:
        """Attention of the last token to all `[S]`, mean over query heads, float32 (equation of section 3.2)."""
        assert layer.queries is not None
        rope, scaling = attachment.ropes[index], attachment.reports[index].scaling
        tokens = layer.keys.shape[1]
        positions = torch.arange(tokens, device=layer.keys.device)[None]
        keys = rope.rotate(layer.keys[None].float(), positions)[0]
        query = rope.rotate(layer.queries[None, :, -1:].float(), positions[:, -1:])[0]
        keys = keys.repeat_interleave(query.shape[0] // keys.shape[0], dim=0)
        return torch.softmax((query @ keys.transpose(1, 2)) * scaling, dim=-1).mean(dim=(0, 1))


def kept_positions(scores: Tensor, m: int) -> Tensor:
    """Positions of the `m` largest `scores` `[S]`, ascending; among equals the later one. All, when S <= m."""
    order = torch.sort(scores.flip(0), descending=True, stable=True).indices[:m]
    return (scores.shape[0] - 1 - order).sort().values
