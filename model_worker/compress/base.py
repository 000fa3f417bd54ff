"""What all compressors share: a captured chunk in, a payload out.

A method is a frozen dataclass whose fields are its parameters, so that it can say how it is asked for (`spec`), which
is stored with every chunk it makes. Most methods keep some tokens' K-V as they are and are written as a `Selection`:
all they say is which.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from model_worker.errors import InputError
from model_worker.window.capture import Captured, LayerCapture
from model_worker.window.selection import gather

if TYPE_CHECKING:
    import kvbank
    from model_worker.attachment.attachment import Attachment


@dataclass(frozen=True, slots=True)
class Payload:
    """What is stored of a chunk: K-V of the memory layers, or soft tokens.

    layers: memory layer -> (keys `[Hkv, m, D]` before RoPE, values `[Hkv, m, D]`, offsets of the kept tokens in the
    chunk, int32, ascending: `[m]`, or `[Hkv, m]` where heads keep different ones); empty beside soft tokens. soft:
    `[n, d]`, which the model reads in the place of input embeddings. method: the compressor as it can be asked for
    again. measured_loss: nats per token, where the method knows it. adapter_digest: whose work it is, where an adapter
    made it.
    """

    layers: Mapping[int, tuple[Tensor, Tensor, Tensor]]
    method: str
    version: str = "1"
    measured_loss: float | None = field(default=None)
    soft: Tensor | None = None
    adapter_digest: str = ""


class Compressor(ABC):
    """One method.

    about: one line for `kvbank compressors`. needs_queries: it reads `LayerCapture.queries`, which cost memory to
    keep. encodes: it runs the model itself and reads nothing but `Captured.token_ids`.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    version: ClassVar[str] = "1"
    # Whether parameters that are no fields are taken too: as a field `more`, pairs of name and text.
    takes_more: ClassVar[bool] = False

    @property
    def needs_queries(self) -> bool:
        return False

    @property
    def encodes(self) -> bool:
        return False

    @abstractmethod
    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        """Pick or make at most its budget of tokens; a chunk within the budget comes back unchanged."""

    def for_bank(self, attachment: "Attachment", bank: "kvbank.Bank", chunk: int) -> "Compressor":
        """This, ready for `bank`: what it needs is loaded, so that what is wrong shows before the first chunk.

        chunk: tokens of a full chunk. Raises BankMismatch where the bank does not take what it makes, InputError where
        no such chunk could be compressed.
        """
        return self

    @property
    def spec(self) -> str:
        """How to ask for exactly this: parameters that have their default are left out."""
        said = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{self.name}:{','.join(said)}" if said else self.name

    @classmethod
    def usage(cls) -> str:
        """How to ask for the method, e.g. `tova:m=N[,observer=last]`."""
        own = fields(cls)  # type: ignore[arg-type]
        said = [f"{f.name}={'N' if f.type is int else f.name.upper()}" for f in own if f.default is MISSING]
        said += [f"[,{f.name}={'...' if f.default is None else f.default}]" for f in own if f.default is not MISSING]
        return f"{cls.name}:{','.join(said).replace(',[', '[')}" if said else cls.name


@dataclass(frozen=True)
class Selection(Compressor):
    """A method that keeps m tokens of each layer as they are, or all of a chunk that has no more."""

    m: int

    def __post_init__(self) -> None:
        if self.m < 1:
            raise InputError(f"{self.name} keeps at least 1 token, not m={self.m}")

    @abstractmethod
    def keep(self, layer: LayerCapture, index: int, attachment: "Attachment") -> Tensor:
        """Offsets that stay in layer `index`, whose chunk is longer than m: `[m]` or `[Hkv, m]`, ascending."""

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        whole = torch.arange(len(captured))
        layers = {}
        for index, layer in captured.layers.items():
            kept = whole if len(captured) <= self.m else self.keep(layer, index, attachment)
            layers[index] = take(layer, kept)
        return Payload(layers, self.spec, self.version)


def alone(captured: Captured, attachment: "Attachment") -> Captured:
    """The chunk encoded on its own: as it was captured, where it was captured so, or by one plain forward."""
    if captured.layers and captured.context == "isolated":
        return captured
    from model_worker.window.encoding import encode

    return encode(attachment, captured.token_ids, captured.start)


def take(layer: LayerCapture, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's part of a payload: the tokens `kept`, `[m]` or `[Hkv, m]`."""
    kept = kept.to(layer.keys.device)
    by_head = kept if kept.ndim == 2 else kept[None]
    keys, values = (gather(x[None], by_head[None])[0] for x in (layer.keys, layer.values))
    return keys, values, kept.to(torch.int32)
