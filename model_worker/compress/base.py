"""What all compressors share: a captured chunk in, a payload out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from model_worker.capture import Captured

if TYPE_CHECKING:
    from model_worker.attachment import Attachment


@dataclass(frozen=True, slots=True)
class Payload:
    """What is stored of a chunk.

    layers: memory layer -> (keys `[Hkv, m, D]` before RoPE, values `[Hkv, m, D]`, kept offsets `[m]`, ascending int).
    method: the compressor as it can be asked for again. measured_loss: nats per token, where the method knows it.
    """

    layers: Mapping[int, tuple[Tensor, Tensor, Tensor]]
    method: str
    version: str = "1"
    measured_loss: float | None = field(default=None)


class Compressor(Protocol):
    """One method. `needs_queries`: it reads `LayerCapture.queries`, which cost memory to keep."""

    name: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    needs_queries: ClassVar[bool]

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        """Pick or make at most its budget of tokens; a chunk within the budget comes back unchanged."""
