"""Tokens drawn at random: the floor that every method has to beat.

The same length, seed and layer give the same tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from model_worker.compress.base import Selection
from model_worker.window.capture import LayerCapture

if TYPE_CHECKING:
    from model_worker.attachment.attachment import Attachment


@dataclass(frozen=True)
class Random(Selection):
    """The method keeps m tokens, drawn anew for every layer from `seed`."""

    seed: int = 0

    name: ClassVar[str] = "random"
    about: ClassVar[str] = "tokens drawn at random"
    paper: ClassVar[str] = "baseline"
    cost: ClassVar[str] = "nothing"

    def keep(self, layer: LayerCapture, index: int, attachment: "Attachment") -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1009 + index)
        return torch.randperm(layer.keys.shape[1], generator=generator)[: self.m].sort().values
