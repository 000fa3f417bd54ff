"""What all compressors share: a captured chunk in, a payload out.

A method is a frozen dataclass whose fields are its parameters, so that it can say how it is asked for (`spec`), which
is stored with every chunk that the method makes. Most methods keep the K-V of some tokens as they are: these are
written as a `Selection`, which says only which tokens stay.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor

from model_worker.compress.spec import FIRST, value
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
    chunk, int32, ascending: `[m]`, or `[Hkv, m]` where heads keep different ones); empty beside soft tokens. method:
    the compressor as it can be asked for again. measured_loss: nats per token, where the method knows it. soft:
    `[n, d]`, which the model reads in the place of input embeddings. adapter_digest: of the adapter that made the
    payload, where one did.
    """

    layers: Mapping[int, tuple[Tensor, Tensor, Tensor]]
    method: str
    version: str = "1"
    measured_loss: float | None = None
    soft: Tensor | None = None
    adapter_digest: str = ""


class Compressor(ABC):
    """One method of compression, with its parameters.

    about: one line for `kvbank compressors`. paper, cost: where the method comes from, and what it costs beside the
    forward that captured the chunk. version: changes when the same parameters make other payloads.
    """

    # Each method is a dataclass. This class is none, since a frozen one would have only frozen ones below it.
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    name: ClassVar[str]
    about: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    version: ClassVar[str] = "1"

    @property
    def needs_queries(self) -> bool:
        """Tell whether the method reads `LayerCapture.queries`, which cost memory to keep."""
        return False

    @property
    def encodes(self) -> bool:
        """Tell whether the method runs the model itself and reads nothing but `Captured.token_ids`."""
        return False

    @abstractmethod
    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        """Pick or make at most its budget of tokens; a chunk within the budget comes back unchanged."""

    def for_bank(self, attachment: "Attachment", bank: "kvbank.Bank", chunk: int) -> "Compressor":
        """Return this method ready for `bank`: what it needs is loaded, so that what is wrong shows before any chunk.

        chunk: tokens of a full chunk. Raises BankMismatch where the bank does not take what the method makes,
        InputError where no such chunk could be compressed.
        """
        return self

    def has_made(self, producer: "kvbank.Producer | None", tokens: int, attachment: "Attachment") -> bool:
        """Tell whether what is stored of a chunk of so many tokens is what this method makes of it, by what the chunk
        says of its maker."""
        return producer is not None and producer.method == self.spec

    @classmethod
    def from_words(cls, words: Mapping[str, str]) -> Self:
        """Return the method with the parameters that `words` name (see spec.py).

        Raises ValueError for a parameter that is unknown, missing or of another form, InputError (which is one) for
        values that the method does not take.
        """
        own, hints = fields(cls), get_type_hints(cls)
        given = dict(words)
        if FIRST in given and own:
            text = given.pop(FIRST)
            if own[0].name in given:
                raise ValueError(f"{own[0].name} stands twice")
            given = {own[0].name: text, **given}
        if unknown := given.keys() - {f.name for f in own}:
            raise ValueError(f"{cls.name} has no parameter {min(unknown)!r}")
        if missing := [f.name for f in own if f.default is MISSING and f.name not in given]:
            raise ValueError(f"{cls.name} lacks {missing[0]}")
        return cls(**{name: value(text, hints[name]) for name, text in given.items()})

    @property
    def spec(self) -> str:
        """Say how to ask for exactly this method: parameters that have their default are left out."""
        said = self._said()
        return f"{self.name}:{','.join(said)}" if said else self.name

    def _said(self) -> list[str]:
        """Return the words of `spec`, in the order of the fields."""
        return [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]

    @classmethod
    def usage(cls) -> str:
        """Say how to ask for the method, e.g. `tova:m=N[,observer=last]`."""
        own = fields(cls)
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
        """Return the offsets that stay in layer `index` of a chunk longer than m: `[m]` or `[Hkv, m]`, ascending."""

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        whole = torch.arange(len(captured))
        layers = {}
        for index, layer in captured.layers.items():
            kept = whole if len(captured) <= self.m else self.keep(layer, index, attachment)
            layers[index] = take(layer, kept)
        return Payload(layers, self.spec, self.version)


def alone(captured: Captured, attachment: "Attachment") -> Captured:
    """Return the chunk encoded on its own: as it was captured, where it was captured so, or by one plain forward."""
    if captured.layers and captured.context == "isolated":
        return captured
    from model_worker.window.encoding import encode

    return encode(attachment, captured.token_ids, captured.start)


def take(layer: LayerCapture, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return one layer's part of a payload: the tokens `kept`, `[m]` or `[Hkv, m]`."""
    kept = kept.to(layer.keys.device)
    by_head = kept if kept.ndim == 2 else kept[None]
    keys, values = (gather(x[None], by_head[None])[0] for x in (layer.keys, layer.values))
    return keys, values, kept.to(torch.int32)
