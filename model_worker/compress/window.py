"""The last m tokens: the baseline that TOVA calls Window (arXiv 2401.06104, section 2.2)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from model_worker.compress.base import Selection
from model_worker.window.capture import LayerCapture

if TYPE_CHECKING:
    from model_worker.attachment.attachment import Attachment


@dataclass(frozen=True)
class Window(Selection):
    """The method keeps the last m tokens."""

    name: ClassVar[str] = "window"
    about: ClassVar[str] = "the last tokens"
    paper: ClassVar[str] = "baseline of arXiv 2401.06104"
    cost: ClassVar[str] = "nothing"

    def keep(self, layer: LayerCapture, index: int, attachment: "Attachment") -> Tensor:
        tokens = layer.keys.shape[1]
        return torch.arange(tokens - self.m, tokens)
