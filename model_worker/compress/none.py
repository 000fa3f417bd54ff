"""The K-V of every token are stored: no compression."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from model_worker.compress.base import Compressor, Payload, take
from model_worker.window.capture import Captured

if TYPE_CHECKING:
    from model_worker.attachment.attachment import Attachment


@dataclass(frozen=True)
class Keep(Compressor):
    """The method keeps all tokens, as MemLong stores them."""

    name: ClassVar[str] = "none"
    about: ClassVar[str] = "all tokens"
    paper: ClassVar[str] = "MemLong, arXiv 2408.16967"
    cost: ClassVar[str] = "nothing"

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        whole = torch.arange(len(captured))
        return Payload({i: take(c, whole) for i, c in captured.layers.items()}, self.spec, self.version)
