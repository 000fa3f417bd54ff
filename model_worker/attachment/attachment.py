"""Attach a memory to any RoPE decoder of transformers, without copied model code.

Public extension points only: the attention interface, the mask interface, the cache, and forward hooks.
"""

import functools
import sys
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model_worker.attachment.attention import Backend
from model_worker.attachment.digest import Reader, plain
from model_worker.attachment.equality import prove_equality
from model_worker.attachment.probe import LayerReport, Layers, evaluating, probe
from model_worker.attachment.reader_watch import ReaderWatch
from model_worker.attachment.rope import rotation_limit
from model_worker.attachment.view import (
    ForwardState,
    ForwardView,
    enter_attention,
    leave_attention,
    not_compiled,
    note_projection,
)
from model_worker.errors import InputError, UnsupportedModel

if TYPE_CHECKING:
    from model_worker.icae import Icae

MODES = ("memlong", "per_layer")
POSITIONS = ("zero", "continual", "original")
_BACKENDS = ("sdpa", "eager")
_TEXTS = 3  # that a model in half precision is tried on
_PREFIX = "kvbank_"
_PREPARE = "prepare_inputs_for_generation"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Which layers remember, which retrieve, and where retrieved keys are put.

    mode: `memlong` (the K-V of one memory layer serve all retrieval layers) or `per_layer` (each its own; works
    untrained). positions: `zero` (all just before the first local token), `continual` (numbered up to it) or
    `original`.
    """

    mode: str
    positions: str
    memory_layers: tuple[int, ...]
    retrieval_layers: tuple[int, ...]

    def source(self, retrieval_layer: int) -> int:
        """The memory layer whose K-V `retrieval_layer` attends to."""
        return self.memory_layers[0] if self.mode == "memlong" else retrieval_layer


class Attachment:
    """A model with memory. Made by `attach`; `detach` leaves the model as it was.

    watch: the reader whose digest K-V carry; None for an attachment that is only tried. `check_unchanged` and
    `check_forward` notice replaced and changed weights, and switched, merged or disabled adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: MemoryPlan,
        layers: Layers,
        gates: Mapping[int, Tensor],
        backend: str,
        watch: ReaderWatch | None,
    ):
        self.model, self.plan, self._watch = model, plan, watch
        self.reports, self.ropes, self.attention_modules = layers.reports, layers.ropes, layers.modules
        self.gates = dict(gates)
        self._backend = backend
        self._handles: list[Any] = []
        if watch is not None:
            self._handles.append(_CacheGuard(plain(model)))
        # ICAE adapters that were loaded for this model, by name: read, and their base hashed, once.
        self.adapters: dict[str, Icae] = {}
        self._handles.append(decoder_of(model).register_forward_pre_hook(self._before_forward, with_kwargs=True))
        for layer in plan.memory_layers:
            self._hook(self.attention_modules[layer], self.reports[layer])

    def _hook(self, attention: nn.Module, report: LayerReport) -> None:
        self._handles.append(attention.register_forward_pre_hook(enter_attention, with_kwargs=True))
        self._handles.append(attention.register_forward_hook(leave_attention, always_call=True))
        if report.capture == "projection":
            normed = isinstance(getattr(attention, "k_norm", None), nn.Module)
            projection = attention.get_submodule("k_norm" if normed else "k_proj")
            self._handles.append(projection.register_forward_hook(note_projection))

    @property
    def kv_heads(self) -> int:
        """K-V heads of the memory layers."""
        return self.reports[self.plan.memory_layers[0]].kv_heads

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.reports[self.plan.memory_layers[0]].head_dim

    @property
    def trained_length(self) -> int | None:
        """Positions that may be used: those the model was trained for, where its configuration says, and below the one
        at which its rotation changes."""
        trained = getattr(self.model.config, "max_position_embeddings", None)  # type: ignore[union-attr]
        return min((n for n in (trained, self.rotation_limit) if n is not None), default=None)

    @property
    def rotation_limit(self) -> int | None:
        """The position at which the rotation of all positions changes (see rope.py)."""
        return rotation_limit(self.model.config)

    def as_mask(self, seen: Tensor, query: Tensor) -> Tensor:
        """Who sees whom, bool `[B, 1 or Hkv, Q, L]`, in the form that the model's backend takes."""
        if seen.shape[1] > 1:
            seen = seen.repeat_interleave(query.shape[1] // seen.shape[1], dim=1)
        if self._backend == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(
            ~seen, torch.finfo(query.dtype).min
        )

    @property
    def reader(self) -> Reader:
        """Digest of the model as it was attached, and its parts."""
        return self._watched.reader

    def check_forward(self, tokens: int) -> None:
        """Raise ReaderChanged when the model is no longer the one whose digest its K-V carry.

        Cheap, for each forward with a memory: how often tensors were written, and when more than one of `tokens` comes
        in, where they are and some of their values too.
        """
        if self._watch is None:  # it is only tried, and nothing is kept
            return
        if tokens > 1:
            self._watch.check_sampled()
        else:
            self._watch.check_counted()

    def check_unchanged(self, *, whole: bool = False) -> None:
        """Raise ReaderChanged as `check_forward` does. whole: look at every byte of the weights, as before a write."""
        if whole:
            self._watched.check_whole()
        else:
            self._watched.check_sampled()

    @property
    def tokenizer(self) -> object | None:
        """The tokenizer that the reader was attached with."""
        return self._watched.tokenizer

    @property
    def _watched(self) -> ReaderWatch:
        assert self._watch is not None
        return self._watch

    @not_compiled
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, ForwardState):
            return None
        if cache.attachment is not self:
            raise InputError("this cache belongs to another attachment; make one for this model")
        active = plain(self.model).config._attn_implementation  # type: ignore[union-attr]
        if active != _PREFIX + self._backend:
            raise InputError(f"attention was set to {active!r} after attach, which knows no memory; detach first")
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
            args = args[1:]
        return args, cache.before_forward(kwargs)

    def detach(self) -> None:
        """Remove hooks and give the model its own attention back. Once is enough; caches of it refuse to go on."""
        if not self._handles:  # by now the model may be somebody else's
            return
        self.unhook()
        _set_attention(self.model, self._backend)

    def unhook(self) -> None:
        """Remove the hooks and leave the attention function, for an attachment that was only tried."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _CacheGuard:
    """Notices a model whose own code for generation puts the cache aside, and the memory with it.

    Phi-3 does so when its rotation changes: without a word the text would go on without a memory.
    """

    def __init__(self, model: Any):
        self._model = model
        self._patch = vars(model).get(_PREPARE)  # somebody else's, who has put it on this one model
        own = type(model).prepare_inputs_for_generation if self._patch is None else self._patch

        @functools.wraps(own)
        def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
            prepared = own(*args, **kwargs) if own is self._patch else own(model, *args, **kwargs)
            cache = kwargs.get("past_key_values")
            if isinstance(cache, ForwardState) and prepared.get("past_key_values") is not cache:
                raise InputError(
                    f"{type(model).__name__} puts its cache aside at this length, and the memory would be lost; end "
                    "the generation before, or start a new cache"
                )
            return prepared

        # A method, so that a copy of the model gets one of its own.
        model.prepare_inputs_for_generation = types.MethodType(prepare, model)

    def remove(self) -> None:
        """Give the model its own method back."""
        vars(self._model).pop(_PREPARE, None)
        if self._patch is not None:
            vars(self._model)[_PREPARE] = self._patch


def attach(
    model: nn.Module,
    tokenizer: object | None = None,
    *,
    mode: str | None = None,
    positions: str | None = None,
    memory_layers: Sequence[int] | None = None,
    retrieval_layers: Sequence[int] | None = None,
    gates: Mapping[int, Tensor] | None = None,
) -> Attachment:
    """Probe `model` and give it a memory.

    Without options a model whose configuration has a `kvbank` entry is attached as that says (`memlong` and `zero` for
    models made for it); any other gets `per_layer` and `continual` in all its layers. gates: MemLong's `[Hq]` gate by
    layer, in (0, 1). Raises UnsupportedModel with the reason, InputError for options that make no sense.
    """
    causal = plain(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModel("its adapter puts a prompt of its own before every input, which a memory does not know")
    backend = getattr(causal.config, "_attn_implementation", None)
    if str(backend).startswith(_PREFIX):
        raise InputError("this model is attached already; detach it first")
    if backend not in _BACKENDS:
        raise UnsupportedModel(f"attention {backend!r} is not among {_BACKENDS}; use set_attn_implementation('sdpa')")
    _set_attention(causal, _register(backend))
    try:
        try:
            layers, plan = _tried(model, backend, (mode, positions, memory_layers, retrieval_layers))
        except (UnsupportedModel, InputError):
            raise
        except Exception as error:  # of foreign code: no keywords to its attention, a cache of its own kind, ...
            reason = f"{type(causal).__name__} does not run with a memory: {type(error).__name__}: {error}"
            raise UnsupportedModel(reason) from error
        return Attachment(model, plan, layers, gates or {}, backend, ReaderWatch(model, tokenizer))
    except BaseException:
        _set_attention(causal, backend)
        raise


def _tried(model: nn.Module, backend: str, options: tuple[Any, ...]) -> tuple[Layers, MemoryPlan]:
    """Probe `model`, plan its memory and prove it, on up to three texts. Raises UnsupportedModel where none succeeds.

    In half precision a router that is close to a tie may choose other experts for the same token, which looks like
    another attention: one text on which all is equal shows that it is not. In full precision the first text decides.
    """
    causal = plain(model)
    precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
    for text in range(1 if precise else _TEXTS):
        try:
            layers = probe(causal, decoder_of(causal), text)
            plan = _plan(causal, layers.reports, *options)
            with evaluating(model):
                _prove(model, layers, backend, text)
            return layers, plan
        except UnsupportedModel as error:
            reason = error
    raise reason


def _prove(model: nn.Module, layers: Layers, backend: str, text: int) -> None:
    """Raise UnsupportedModel unless a memory in every layer is exact on this very model (see equality.py)."""
    every = tuple(report.layer for report in layers.reports)
    plan = MemoryPlan("per_layer", "original", every, every)
    trial = Attachment(model, plan, layers, {}, backend, None)
    try:
        prove_equality(trial, text)
    finally:
        trial.unhook()


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack of layers below the language-model head."""
    return plain(model).base_model  # type: ignore[return-value]


def _plan(
    model: nn.Module,
    reports: list[LayerReport],
    mode: str | None,
    positions: str | None,
    memory_layers: Sequence[int] | None,
    retrieval_layers: Sequence[int] | None,
) -> MemoryPlan:
    made_for = getattr(model.config, "kvbank", None) or {}
    mode = mode or made_for.get("mode", "per_layer")
    if mode not in MODES:
        raise InputError(f"mode {mode!r} is not one of {MODES}")
    own = made_for if made_for.get("mode") == mode else {}
    positions = positions or own.get("positions", "zero" if mode == "memlong" else "continual")
    if positions not in POSITIONS:
        raise InputError(f"positions {positions!r} is not one of {POSITIONS}")
    for report in reports:  # also one that would not retrieve: its window has to move with those of the others
        if report.kind not in ("rope", "nope"):
            raise UnsupportedModel(f"{type(model).__name__}: layer {report.layer} is {report.kind}: {report.reason}")
    usable = [report.layer for report in reports]
    if mode == "memlong":
        memory = memory_layers or own.get("memory_layers") or [usable[len(usable) // 2]]
        retrieval = retrieval_layers or own.get("retrieval_layers") or [x for x in usable if x >= memory[0]]
        if len(memory) != 1:
            raise InputError(f"mode memlong has one memory layer, not {len(memory)}")
    else:
        retrieval = retrieval_layers or memory_layers or own.get("retrieval_layers") or usable
        memory = memory_layers or retrieval
        if list(memory) != list(retrieval):
            raise InputError("in mode per_layer memory layers and retrieval layers are the same")
    plan = MemoryPlan(mode, positions, tuple(sorted(memory)), tuple(sorted(retrieval)))
    _check_layers(plan, reports)
    return plan


def _check_layers(plan: MemoryPlan, reports: list[LayerReport]) -> None:
    for layer in {*plan.memory_layers, *plan.retrieval_layers}:
        if not 0 <= layer < len(reports):
            raise InputError(f"layer {layer} does not exist; the model has {len(reports)}, counted from 0")
    shapes = {(reports[x].kv_heads, reports[x].head_dim) for x in {*plan.memory_layers, *plan.retrieval_layers}}
    if len(shapes) > 1:
        raise UnsupportedModel(f"memory and retrieval layers differ in K-V heads or head size: {sorted(shapes)}")


def _register(backend: str) -> str:
    """Attention and mask under one name: without its mask function a model runs unmasked, and says nothing."""
    name = _PREFIX + backend
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            dropout: float = 0.0,
            *,
            kvbank: Any = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:
            # Whoever wraps what is registered may hand dropout on by place, as kvpress does; the backends differ in
            # what stands there, so it goes to them by name.
            own, kwargs = _own_attention(backend, module), {"dropout": dropout, **kwargs}
            if kvbank is None:
                return own(module, query, key, value, attention_mask, **kwargs)
            return _attend(kvbank, own, module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])
    return name


@not_compiled
def _attend(view: ForwardView, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return view.attend(*args, **kwargs)


def _own_attention(backend: str, module: nn.Module) -> Backend:
    """The backend as the model's own file resolves it (eager differs from file to file: softcap, sinks)."""
    file = vars(sys.modules[type(module).__module__])
    if backend == "eager":
        return file["eager_attention_forward"]  # type: ignore[no-any-return]
    return file.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[backend]  # type: ignore[no-any-return]


def _set_attention(model: nn.Module, name: str) -> None:
    causal = plain(model)
    with suppress(ValueError):
        causal.set_attn_implementation(name)  # type: ignore[operator]
    if causal.config._attn_implementation != name:  # type: ignore[union-attr]
        raise UnsupportedModel(f"{type(causal).__name__} does not route its attention through transformers' interface")
