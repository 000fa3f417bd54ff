"""No compression: every token's K-V."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from model_worker.capture import Captured
from model_worker.compress.base import Payload

if TYPE_CHECKING:
    from model_worker.attachment import Attachment


@dataclass(frozen=True)
class Keep:
    """All tokens, as MemLong stores them."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "MemLong, arXiv 2408.16967"
    cost: ClassVar[str] = "nothing"
    needs_queries: ClassVar[bool] = False

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        offsets = torch.arange(len(captured), dtype=torch.int32)
        return Payload({i: (c.keys, c.values, offsets) for i, c in captured.layers.items()}, "none")
