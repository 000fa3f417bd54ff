"""The scorers of NVIDIA's kvpress as chunk compressors (github.com/NVIDIA/kvpress; checked with 0.5.5).

An optional extra, imported when it is first asked for. A press scores each key of each K-V head; which tokens stay is
then decided here, so that the budget is exact, offsets ascend, and keys are stored before RoPE. Its own `compress`
(which drops from the cache, in the order of scores) is not used.

Only presses whose selection is a rectangle (the same number of tokens in every head of a layer) fit a payload; others
are refused with the list of those that do. PyramidKV keeps fewer tokens the higher the layer. Deviations: ties go to
the later token; presses that draw random numbers draw the same ones for every chunk.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from model_worker.attachment.model_parts import config_of, embeddings_of, layer_of
from model_worker.compress.base import Compressor, Payload, alone, take
from model_worker.compress.none import Keep
from model_worker.compress.spec import FIRST
from model_worker.errors import InputError
from model_worker.window.capture import Captured
from model_worker.window.selection import kept_positions

if TYPE_CHECKING:
    import kvbank
    from model_worker.attachment.attachment import Attachment

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
    "PyramidKVPress",
    "RandomPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "TOVAPress",
)
_AROUND, _PYRAMID, _WEIGHTS = "CriticalKVPress", "PyramidKVPress", "ObservedAttentionPress"
# More tokens than any press needs with its own parameters (SnapKV: 65).
_TRIAL = 128
_INSTALL = (
    "press needs the package kvpress, which asks for an older transformers than ours: "
    "pip install cachetools datasets fire requests && pip install --no-deps kvpress==0.5.5"
)


class _CannotScore(Exception):
    """A press refuses a chunk, mostly because it is too short; the text is what the press said."""


@dataclass(frozen=True)
class Press(Compressor):
    """The method keeps the tokens that a press scores highest.

    press: class name in kvpress. ratio: share of tokens dropped, as kvpress counts; or m: tokens kept. base: the
    scorer that CriticalKVPress refines. more: the press's own parameters by name, such as window_size=32.
    A chunk that the press cannot score, most often because it is too short, is stored uncompressed.
    """

    press: str
    ratio: float | None = None
    m: int | None = None
    base: str | None = None
    more: tuple[tuple[str, str], ...] = ()

    name: ClassVar[str] = "press"
    about: ClassVar[str] = "what a scorer of NVIDIA's kvpress keeps (optional extra)"
    paper: ClassVar[str] = "NVIDIA/kvpress on GitHub"
    cost: ClassVar[str] = "a forward of its own and the press's scores"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.m is None):
            raise InputError(f"press {self.press} takes either ratio=... or m=...")
        if not 0 <= (self.ratio or 0) < 1 or (self.m is not None and self.m < 1):
            raise InputError("ratio is at least 0 and below 1, m at least 1")
        if self.press not in (*SCORERS, _AROUND):
            raise InputError(
                f"{self.press} does not keep the same number of tokens in every head, or is no press; "
                f"these work: {', '.join(SCORERS)}, {_AROUND}"
            )
        if (self.press == _AROUND) != (self.base is not None) or self.base not in (None, *SCORERS):
            raise InputError(f"{_AROUND}, and no other press, takes base=..., one of {', '.join(SCORERS)}")
        if self.m is not None and self.press == _PYRAMID:
            raise InputError(f"{_PYRAMID} keeps another number of tokens in each layer: it takes ratio=..., not m=...")

    @property
    def encodes(self) -> bool:
        return True

    @classmethod
    def from_words(cls, words: Mapping[str, str]) -> Self:
        """Return the method with the parameters that `words` name; others than its own are the press's."""
        own = {FIRST, *(f.name for f in fields(cls))} - {"more"}
        more = {key: text for key, text in words.items() if key not in own}
        if wrong := [key for key, text in more.items() if not key.isidentifier() or not text]:
            raise ValueError(f"{wrong[0]!r} is no parameter with a value")
        made = super().from_words({key: text for key, text in words.items() if key in own})
        return replace(made, more=tuple(more.items()))

    def _said(self) -> list[str]:
        own = [word for word in super()._said() if not word.startswith("more=")]
        return [*own, *(f"{name}={text}" for name, text in self.more)]

    @classmethod
    def usage(cls) -> str:
        return super().usage().replace("[,more=()]", "[,PARAMETER=VALUE]")

    def for_bank(self, attachment: "Attachment", bank: "kvbank.Bank", chunk: int) -> "Compressor":
        """Return this method as it is. Raises InputError where the press can score no chunk of this model at all."""
        numbers = [int(text) for _, text in self.more if text.isdecimal()]  # one may be the length that it needs
        tokens = _TRIAL + max(numbers, default=0)
        tokens = min(tokens, attachment.trained_length or tokens)
        vocabulary = embeddings_of(attachment.model).weight.shape[0]
        ids = [token % vocabulary for token in range(tokens)]
        try:
            self._scored(Captured(ids, 0, {}, "isolated"), attachment, max(1, tokens // 2))
        except _CannotScore as error:
            raise InputError(f"{self.press} cannot score a chunk of {tokens} tokens of this model: {error}") from error
        return self

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        tokens = len(captured)
        budget = min(tokens, self.m or max(1, int(tokens * (1 - (self.ratio or 0)))))
        if budget == tokens:
            return replace(Keep().compress(alone(captured, attachment), attachment), method=self.spec)
        try:
            chunk, scores, budgets = self._scored(captured, attachment, budget)
        except _CannotScore:
            return Keep().compress(alone(captured, attachment), attachment)
        layers = {}
        for index, layer in chunk.layers.items():
            kept = kept_positions(scores[index][0].float(), budgets.get(index, budget))
            layers[index] = take(layer, kept[0] if bool((kept == kept[0]).all()) else kept)
        return Payload(layers, self.spec, self.version)

    def _scored(
        self, captured: Captured, attachment: "Attachment", budget: int
    ) -> tuple[Captured, dict[int, Tensor], dict[int, int]]:
        """Return the chunk, its scores `[1, Hkv, S]` by layer, and the budgets of layers that differ in that.

        Raises _CannotScore.
        """
        from model_worker.window.encoding import encode

        tokens = len(captured)
        self._check(attachment)
        press = self._made(1 - budget / tokens if self.ratio is None else self.ratio)
        with _scoring(press, attachment) as (scores, budgets):
            chunk = encode(attachment, captured.token_ids)
        return chunk, scores, budgets

    def _check(self, attachment: "Attachment") -> None:
        """Raise InputError for a press that reads attention weights where the model's attention computes none."""
        backend = str(config_of(attachment.model)._attn_implementation)
        if _WEIGHTS in (self.press, self.base) and not backend.endswith("eager"):
            raise InputError(f"{_WEIGHTS} reads attention weights: load the model with attn_implementation='eager'")

    @staticmethod
    def check_installed() -> Any:
        """Return the package kvpress. Raises InputError, with how it is installed, where it is not there."""
        try:
            return import_module("kvpress")  # of an extra that is not installed with the others
        except ImportError as error:
            raise InputError(f"{_INSTALL} ({error})") from None

    def _made(self, ratio: float) -> Any:
        """Return the press itself, which drops `ratio` of the tokens. Raises InputError without kvpress."""
        kvpress = self.check_installed()
        more = dict(self.more)
        if self.base is None:
            return _called(getattr(kvpress, self.press), more, compression_ratio=ratio)
        around = getattr(kvpress, self.press)
        own = {name: more.pop(name) for name in _parameters(around) if name in more}
        return _called(around, own, press=_called(getattr(kvpress, self.base), more, compression_ratio=ratio))


def _called(kind: Any, texts: Mapping[str, str], **given: Any) -> Any:
    """Return a press of class `kind` with what is `given` and what `texts` say. Raises InputError for what is wrong."""
    known = {name: default for name, default in _parameters(kind).items() if name not in given}
    try:
        return kind(**given, **{name: _parsed(text, known[name]) for name, text in texts.items()})
    except KeyError as error:
        allowed = ", ".join(known) or "none"
        raise InputError(f"{kind.__name__} has no parameter {error.args[0]!r}; it has: {allowed}") from None
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"{kind.__name__} does not take {dict(texts)}: {error}") from None


def _parameters(kind: Any) -> dict[str, Any]:
    """Return the names and defaults of a press's parameters."""
    return {name: p.default for name, p in inspect.signature(kind).parameters.items() if name[0] != "_"}


def _parsed(text: str, default: Any) -> Any:
    """Return what `text` says, of the type that the default has. Raises ValueError."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() == "true"
    if isinstance(default, int) or (default is None and text.isdecimal()):
        return int(text)
    return float(text)


@contextmanager
def _scoring(press: Any, attachment: "Attachment") -> Iterator[tuple[dict[int, Tensor], dict[int, int]]]:
    """Note, while it lasts, the press's scores `[1, Hkv, S]` by memory layer in every forward, and its own budgets.

    The forward raises _CannotScore where the press refuses the chunk.
    """
    decoder = attachment.decoder
    scores: dict[int, Tensor] = {}
    budgets: dict[int, int] = {}

    def score(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        index = layer_of(module)
        held = kwargs["past_key_values"].layers[index]
        length = held.keys.shape[2]
        kwargs = {**kwargs, "cache_position": torch.arange(length, device=held.keys.device)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                scores[index] = press.score(module, kwargs["hidden_states"], held.keys, held.values, output[1], kwargs)
                if hasattr(press, "get_layer_budget"):
                    budgets[index] = press.get_layer_budget(module, length)
            except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                raise _CannotScore(reason) from error

    with ExitStack() as stack:
        press.post_init_from_model(attachment.model)
        for index in attachment.plan.memory_layers:
            attention = decoder.layers[index].self_attn
            if not hasattr(attention, "rotary_emb"):  # presses look for it there
                # Not as a module of the layer: a model with other modules would be another reader.
                vars(attention)["rotary_emb"] = decoder.rotary_emb
                stack.callback(vars(attention).pop, "rotary_emb")
            stack.callback(attention.register_forward_hook(score, with_kwargs=True).remove)
        yield scores, budgets
