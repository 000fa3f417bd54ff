"""Scorers of NVIDIA's kvpress as chunk compressors (github.com/NVIDIA/kvpress; checked with 0.5.5).

An optional extra, imported when it is first asked for. A press scores each key of each K-V head; which tokens stay is
then decided here, so that the budget is exact, offsets ascend, and keys are stored before RoPE. Its own `compress`
(which drops from the cache, in the order of scores) is not used.

Only presses whose selection is a rectangle (the same number of tokens in every head and layer) fit a payload; others
are refused with the list of those that do. Deviations: ties go to the later token; presses that draw random numbers
draw the same ones for every chunk.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from model_worker.capture import Captured
from model_worker.compress.base import Compressor, Payload, take
from model_worker.errors import InputError
from model_worker.selection import kept_positions

if TYPE_CHECKING:
    from model_worker.attachment import Attachment

SCORERS = (
    "CURPress",
    "CapPress",
    "CompactorPress",
    "ExpectedAttentionPress",
    "KeyDiffPress",
    "KnormPress",
    "LagKVPress",
    "LeverageScorePress",
    "NonCausalAttnPress",
    "ObservedAttentionPress",
    "RandomPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "TOVAPress",
)
_INSTALL = (
    "press needs the package kvpress, which asks for an older transformers than ours: "
    "pip install cachetools datasets fire requests && pip install --no-deps kvpress==0.5.5"
)


@dataclass(frozen=True)
class Press(Compressor):
    """press: class name in kvpress. ratio: share of tokens dropped, as kvpress counts; or m: tokens kept."""

    press: str
    ratio: float | None = None
    m: int | None = None

    name: ClassVar[str] = "press"
    about: ClassVar[str] = "what a scorer of NVIDIA's kvpress keeps (optional extra)"
    paper: ClassVar[str] = "kvpress, github.com/NVIDIA/kvpress"
    cost: ClassVar[str] = "a forward of its own and the press's scores"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.m is None):
            raise InputError(f"press {self.press} takes either ratio=... or m=...")
        if not 0 <= (self.ratio or 0) < 1 or (self.m is not None and self.m < 1):
            raise InputError("ratio is at least 0 and below 1, m at least 1")
        if self.press not in SCORERS:
            raise InputError(
                f"{self.press} does not keep the same number of tokens in every head and layer, or is no press; "
                f"these work: {', '.join(SCORERS)}"
            )

    @property
    def encodes(self) -> bool:
        return True

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        from model_worker.encoding import encode

        tokens = len(captured)
        budget = min(tokens, self.m or max(1, int(tokens * (1 - (self.ratio or 0)))))
        press = _made(self.press, 1 - budget / tokens if self.ratio is None else self.ratio)
        with _scoring(press, attachment) as scores:
            chunk = encode(attachment, captured.token_ids)
        layers = {}
        for index, layer in chunk.layers.items():
            kept = kept_positions(scores[index][0].float(), budget)
            layers[index] = take(layer, kept[0] if bool((kept == kept[0]).all()) else kept)
        return Payload(layers, self.spec, self.version)


def _made(name: str, ratio: float) -> Any:
    try:
        import kvpress  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError(f"{_INSTALL} ({error})") from None
    return getattr(kvpress, name)(compression_ratio=ratio)


@contextmanager
def _scoring(press: Any, attachment: "Attachment") -> Iterator[dict[int, Tensor]]:
    """Within it, every forward leaves the press's scores `[1, Hkv, S]` by memory layer."""
    from model_worker.attachment import decoder_of

    decoder: Any = decoder_of(attachment.model)
    scores: dict[int, Tensor] = {}

    def score(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        index = int(module.layer_idx)  # type: ignore[arg-type]
        held = kwargs["past_key_values"].layers[index]
        length = held.keys.shape[2]
        kwargs = {**kwargs, "cache_position": torch.arange(length, device=held.keys.device)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                found = press.score(module, kwargs["hidden_states"], held.keys, held.values, output[1], kwargs)
            except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                name = type(press).__name__
                raise InputError(f"{name} cannot score a chunk of {length} tokens here: {reason}") from error
        scores[index] = found

    with ExitStack() as stack:
        press.post_init_from_model(attachment.model)
        for index in attachment.plan.memory_layers:
            attention = decoder.layers[index].self_attn
            if not hasattr(attention, "rotary_emb"):  # presses look for it there
                attention.rotary_emb = decoder.rotary_emb
                stack.callback(delattr, attention, "rotary_emb")
            stack.callback(attention.register_forward_hook(score, with_kwargs=True).remove)
        yield scores
