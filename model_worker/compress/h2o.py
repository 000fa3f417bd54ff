"""Half of the budget for the most recent tokens, half for the heavy hitters: H2O (arXiv 2306.14048, section 4).

Heavy hitters are the tokens with the largest sum of attention weights over all queries, one set a K-V head.
Deviations: the sums are taken from one forward over the whole chunk (the paper evicts token by token, so that an
evicted token gathers no more); grouped query heads share their K-V head's set by their mean; ties go to the
later token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from model_worker.compress.base import Selection
from model_worker.compress.observe import observed
from model_worker.window.capture import LayerCapture
from model_worker.window.selection import kept_positions

if TYPE_CHECKING:
    from model_worker.attachment.attachment import Attachment


@dataclass(frozen=True)
class HeavyHitters(Selection):
    """The method keeps m tokens per head, the larger half of them the most recent ones."""

    name: ClassVar[str] = "h2o"
    about: ClassVar[str] = "half the last tokens, half those with most attention from all, per head"
    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    cost: ClassVar[str] = "all queries times all keys, per memory layer"

    @property
    def needs_queries(self) -> bool:
        return True

    def keep(self, layer: LayerCapture, index: int, attachment: "Attachment") -> Tensor:
        tokens, hitters = layer.keys.shape[1], self.m // 2
        older = tokens - (self.m - hitters)
        scores = observed(layer, index, attachment, tokens, "own")[:, :older]
        recent = torch.arange(older, tokens, device=scores.device).expand(scores.shape[0], -1)
        return torch.cat([kept_positions(scores, hitters), recent], dim=1)
