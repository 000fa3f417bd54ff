"""The first few and the last tokens: attention sinks, StreamingLLM (arXiv 2309.17453, section 3.2); TOVA's Window+4.

Deviation: tokens keep the positions they had (StreamingLLM numbers what is in its cache anew); the reader places them.
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
class Sinks(Selection):
    """The method keeps m tokens: the first `sinks` (at most m - 1, so that the last one stays) and the last."""

    sinks: int = 4

    name: ClassVar[str] = "sinks"
    about: ClassVar[str] = "the first 4 and the last tokens"
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    cost: ClassVar[str] = "nothing"

    def keep(self, layer: LayerCapture, index: int, attachment: "Attachment") -> Tensor:
        tokens, first = layer.keys.shape[1], min(self.sinks, self.m - 1)
        return torch.cat([torch.arange(first), torch.arange(tokens - self.m + first, tokens)])
