"""ICAE as a chunk compressor: what is stored is the memory slots that an adapter makes of a chunk (see icae/).

Two payloads. Soft tokens are the canonical one: the frozen model reads them in the place of input embeddings, several
of them in one forward, exactly. K-V of the memory layers are derived from them by one forward of the frozen decoder,
and are smaller where few layers remember: a slot takes d numbers, its K-V 2 * M * Hkv * D for M memory layers. An
adapter with the interface `kv` makes K-V itself, and no soft tokens.

How well the slots hold a chunk is measured as it is written: the loss of its own text restored from them (AE), in nats
per token, which costs one more forward of the decoder. `guard` is off unless it is given: what a nat per token is worth
depends on the model, its vocabulary and the adapter, and no number is right for all of them. Look at what was measured
(`Producer.measured_loss` of each chunk) before choosing one.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

import torch

from model_worker.compress.base import Compressor, Payload, alone
from model_worker.compress.none import Keep
from model_worker.errors import BankMismatch, InputError
from model_worker.window.capture import Captured, Layers

if TYPE_CHECKING:
    import kvbank
    from model_worker.attachment.attachment import Attachment
    from model_worker.icae import Icae, Slots

PAYLOADS = ("auto", "soft", "kv")
# Adapters that were loaded for an attached model, by name: read, and their base hashed, once. Weak, since a model that
# goes takes its adapters with it.
ADAPTERS: "WeakKeyDictionary[Attachment, dict[str, Icae]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Autoencoder(Compressor):
    """The method stores a chunk as the slots of an ICAE adapter.

    adapter: folder or hub id of the adapter, which is made for the attached model. payload: `soft`, `kv`, or `auto`,
    the smaller of them. guard: above so many nats per token in restoring it, a chunk is stored uncompressed.
    Stored uncompressed too are a chunk shorter than twice its slots, one that could not be restored within the model's
    positions, and one whose loss is no number. A bank whose chunks would all be stored so is not opened.
    """

    adapter: str
    payload: str = "auto"
    guard: float | None = None

    name: ClassVar[str] = "icae"
    about: ClassVar[str] = "memory slots of a trained adapter, as soft tokens or as K-V (extra: icae)"
    paper: ClassVar[str] = "ICAE, arXiv 2307.06945"
    cost: ClassVar[str] = "a forward of the encoder and one of the decoder; K-V of soft tokens one more"

    def __post_init__(self) -> None:
        if self.payload not in PAYLOADS:
            raise InputError(f"payload {self.payload!r} is not auto, soft or kv")

    @property
    def encodes(self) -> bool:
        return True

    def for_bank(self, attachment: "Attachment", bank: "kvbank.Bank", chunk: int) -> "Compressor":
        icae = adapter_of(attachment, self.adapter)
        # What is cut at the end of a sentence has at least half of a full chunk's tokens.
        if all(_why_not(icae, tokens) for tokens in range(chunk, chunk // 2, -1)):
            raise InputError(f"chunks of {chunk} tokens are not compressed: {_why_not(icae, chunk)}")
        soft = self._takes_soft(icae, attachment)
        if not soft or bank.kv is None or bank.kv.hidden_size:
            return self
        if self.payload == "auto":
            return replace(self, payload="kv")
        raise BankMismatch(f"bank {bank.name!r} takes no soft tokens, which are newer than it; write payload=kv")

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        from model_worker.icae.decode import loss

        icae, ids = adapter_of(attachment, self.adapter), captured.token_ids
        soft = self._takes_soft(icae, attachment)
        if _why_not(icae, len(ids)):
            return _uncompressed(captured, attachment, None)
        with torch.no_grad():
            [slots] = icae.encode([ids])
            measured = float(loss(icae, slots, ids))
        if not math.isfinite(measured):
            return _uncompressed(captured, attachment, None)
        if self.guard is not None and measured > self.guard:
            return _uncompressed(captured, attachment, measured)
        if soft:
            return Payload({}, self.spec, self.version, measured, slots.soft, icae.digest)
        layers, made_by = _layers(slots, attachment)
        return Payload(layers, self.spec, f"{self.version}+{made_by}", measured, adapter_digest=icae.digest)

    def has_made(self, producer: "kvbank.Producer | None", tokens: int, attachment: "Attachment") -> bool:
        if producer is None:
            return False
        icae = adapter_of(attachment, self.adapter)
        if producer.method == Keep().spec:
            return producer.measured_loss is not None or bool(_why_not(icae, tokens))
        return (producer.method, producer.adapter_digest) == (self.spec, icae.digest)

    def _takes_soft(self, icae: "Icae", attachment: "Attachment") -> bool:
        """Tell whether soft tokens are what is stored. Raises InputError where the adapter makes none."""
        if icae.config.interface == "kv":
            if self.payload == "soft":
                raise InputError(f"the ICAE adapter {self.adapter} makes K-V, no soft tokens; write payload=kv or auto")
            return False
        width = icae.memory.shape[1]
        pairs = 2 * len(attachment.plan.memory_layers) * attachment.kv_heads * attachment.head_dim
        return self.payload == "soft" or (self.payload == "auto" and width <= pairs)


def adapter_of(attachment: "Attachment", name: str) -> "Icae":
    """Return the ICAE adapter `name` on the attached model, as it was at the first call; the model is not changed.

    Raises ModelNotFound, and InputError for an adapter of another base or without peft.
    """
    from model_worker.icae import Icae

    known = ADAPTERS.setdefault(attachment, {})
    if name not in known:
        known[name] = Icae.from_pretrained(attachment.model, name)
    return known[name]


def _why_not(icae: "Icae", tokens: int) -> str:
    """Say why a chunk of so many tokens is not compressed; return an empty text where it is.

    Slots would save too little, or a span has fewer tokens than slots, which no adapter was trained for, or the chunk
    is longer than the model's positions.
    """
    spans, slots = icae.spans(tokens), icae.config.slots
    if tokens < 2 * slots * len(spans):
        return f"{tokens} tokens are fewer than twice their {slots * len(spans)} slots"
    shortest = min(span.stop - span.start for span in spans)
    if shortest < slots:
        return f"a span of {shortest} tokens has fewer than the adapter's {slots} slots"
    return icae.config.too_long(tokens, icae.limit)


def _uncompressed(captured: Captured, attachment: "Attachment", measured: float | None) -> Payload:
    """Return the payload of all tokens, with the loss that was measured, if any."""
    return replace(Keep().compress(alone(captured, attachment), attachment), measured_loss=measured)


def _layers(slots: "Slots", attachment: "Attachment") -> tuple[Layers, str]:
    """Return the K-V of the memory layers, and which of decoder and encoder made them: theirs differ."""
    from model_worker.icae.expanded import expanded

    if slots.layers is None:
        assert slots.soft is not None
        return expanded(slots.soft, attachment), "decoder"
    offsets = slots.positions.to(torch.int32)
    return {layer: (*slots.layers[layer], offsets) for layer in attachment.plan.memory_layers}, "encoder"
