"""Attach a memory to any RoPE decoder of transformers, without copied model code: probe it, plan its memory, prove it.

`attach` stands above the attachment (what is done to a model) and the window (the cache that remembers), since a model
is accepted only where both together compute what the model itself computes.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.backends import BACKENDS, PREFIX, register, set_attention
from model_worker.attachment.digest import reader_of
from model_worker.attachment.layer_choice import LayerChoice, read_layers
from model_worker.attachment.model_parts import decoder_of, device_of, evaluating, plain
from model_worker.attachment.plan import MemoryPlan, PlanOptions, check_usable
from model_worker.attachment.probe import probe
from model_worker.attachment.reader_watch import ReaderWatch
from model_worker.attachment.reports import ProbedLayers
from model_worker.errors import InputError, UnsupportedModel
from model_worker.window.equality import prove_equality

_TEXTS = 3  # that a model in half precision is tried on


def attach(
    model: nn.Module,
    tokenizer: object | None = None,
    *,
    mode: str | None = None,
    positions: str | None = None,
    memory_layers: Sequence[int] | None = None,
    retrieval_layers: Sequence[int] | None = None,
    layers: str | os.PathLike[str] | None = None,
    gates: Mapping[int, Tensor] | None = None,
) -> Attachment:
    """Probe `model` and give it a memory.

    Without options a model whose configuration has a `kvbank` entry is attached as that says (`memlong` and `zero` for
    models made for it); any other gets `per_layer` and `continual` in all its layers. layers: a file of `kvbank layers
    --choose`, which says mode, memory layers and retrieval layers of the model that it was made for. gates: MemLong's
    `[Hq]` gate by layer, in (0, 1); by default those of the entry, where its mode is the plan's. Raises
    UnsupportedModel with the reason, InputError for options that make no sense and for the layers of another model.
    """
    asked = PlanOptions(mode, positions, memory_layers, retrieval_layers)
    chosen = None if layers is None else read_layers(layers)
    if chosen is not None:
        asked = _asked_by(chosen, asked)
    causal = plain(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModel("its adapter puts a prompt of its own before every input, which a memory does not know")
    backend = getattr(causal.config, "_attn_implementation", None)
    if str(backend).startswith(PREFIX):
        raise InputError("this model is attached already; detach it first")
    if backend not in BACKENDS:
        raise UnsupportedModel(f"attention {backend!r} is not among {BACKENDS}; use set_attn_implementation('sdpa')")
    if chosen is not None:
        chosen.check_reader(reader_of(model, tokenizer))
    set_attention(causal, register(backend))
    try:
        try:
            probed, plan = _tried(model, backend, asked)
        except (UnsupportedModel, InputError):
            raise
        except Exception as error:  # of foreign code: no keywords to its attention, a cache of its own kind, ...
            reason = f"{type(causal).__name__} does not run with a memory: {type(error).__name__}: {error}"
            raise UnsupportedModel(reason) from error
        own = _gates_made_for(causal, plan) if gates is None else gates
        return Attachment(model, plan, probed, own, backend, ReaderWatch(model, tokenizer))
    except BaseException:
        set_attention(causal, backend)
        raise


def _gates_made_for(causal: Any, plan: MemoryPlan) -> dict[int, Tensor]:
    """Return the gates of the `kvbank` entry of a model's configuration, by layer; none for another mode than its own.

    Raises InputError for gates that do not fit the model.
    """
    made_for = getattr(causal.config, "kvbank", None) or {}
    said = made_for.get("gates") or {} if made_for.get("mode") == plan.mode else {}
    device, heads = device_of(causal), causal.config.num_attention_heads
    try:
        gates = {int(layer): torch.tensor(gate, dtype=torch.float32, device=device) for layer, gate in said.items()}
    except (TypeError, ValueError, AttributeError):
        gates = {-1: torch.empty(0)}
    layers = range(causal.config.num_hidden_layers)
    for layer, gate in gates.items():
        if layer not in layers or gate.shape != (heads,) or not bool(((gate >= 0) & (gate <= 1)).all()):
            raise InputError(
                f"the gates of the model's kvbank entry are not {heads} numbers between 0 and 1 for each of some layers"
            )
    return gates


def _asked_by(chosen: LayerChoice, asked: PlanOptions) -> PlanOptions:
    """Return `asked` with the layers of a choice. Raises InputError where both say which layers."""
    beside = [name for name in ("mode", "memory_layers", "retrieval_layers") if getattr(asked, name) is not None]
    if beside:
        raise InputError(f"layers is a file that says the {', '.join(beside)} too; give one of them")
    return PlanOptions(chosen.mode, asked.positions, chosen.memory_layers, chosen.retrieval_layers)


def _tried(model: nn.Module, backend: str, asked: PlanOptions) -> tuple[ProbedLayers, MemoryPlan]:
    """Probe `model`, plan its memory and prove it, on up to three texts. Raises UnsupportedModel where none succeeds.

    In half precision a router that is close to a tie may choose other experts for the same token, which looks like
    another attention: one text on which all is equal shows that it is not. In full precision the first text decides.
    """
    causal = plain(model)
    made_for = getattr(causal.config, "kvbank", None) or {}
    precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
    for text in range(1 if precise else _TEXTS):
        try:
            layers = probe(causal, decoder_of(causal), text)
            check_usable(type(causal).__name__, layers.reports)
            plan = MemoryPlan.resolve(asked, made_for, layers.reports)
            with evaluating(model):
                _prove(model, layers, backend, text)
            return layers, plan
        except UnsupportedModel as error:
            reason = error
    raise reason


def _prove(model: nn.Module, layers: ProbedLayers, backend: str, text: int) -> None:
    """Raise UnsupportedModel unless a memory in every layer is exact on this very model (see window/equality.py)."""
    every = tuple(report.layer for report in layers.reports)
    plan = MemoryPlan("per_layer", "original", every, every)
    trial = Attachment(model, plan, layers, {}, backend, None)
    try:
        prove_equality(trial, text)
    finally:
        trial.unhook()
