"""What of a model is trained: the weights above the memory layer, or an adapter there, as MemLong has it; or all."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model_worker.attachment.model_parts import embeddings_of, plain
from model_worker.attachment.with_peft import using_peft
from model_worker.errors import InputError, first_line

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Lora:
    """The form of an adapter. targets: names of linear modules. norms: train the norms of the same layers beside it."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    norms: bool


@dataclass(frozen=True, slots=True)
class Trained:
    """How much of a model is trained: tensors that are, and values in them and in all."""

    tensors: int
    values: int
    all_values: int

    @property
    def share(self) -> float:
        """Return the share of trained values."""
        return self.values / self.all_values


def with_lora(model: Any, lora: Lora, above: int) -> Any:
    """Return `model` with a new adapter in the layers from `above` on; nothing else is trained.

    Raises InputError without peft, for a model that has an adapter, and for targets that are not there.
    """
    if hasattr(model, "peft_config"):
        raise InputError("this model has an adapter already: merge it, or train the model without it")
    norms = [name for name, _ in _norms(model, above)] if lora.norms else []
    with using_peft("--train lora") as peft:
        settings = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
            layers_to_transform=list(range(above, model.config.num_hidden_layers)),
            modules_to_save=norms or None,
            bias="none",
            task_type="CAUSAL_LM",
        )
        dtype = model.dtype
        try:
            made = peft.get_peft_model(model, settings)
        except (ValueError, re.error) as error:
            raise InputError(f"LoRA cannot be put on this model: {first_line(error)}") from None
    for module in made.modules():
        if dtype != torch.float32 and isinstance(module, peft.utils.ModulesToSaveWrapper):
            for norm in module.modules_to_save.values():
                _compute_in_float32(norm, dtype)
    return made


def _compute_in_float32(norm: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of a norm in float32, as peft keeps LoRA's; what goes out has the model's dtype.

    In bfloat16 the steps of a rate of 5e-5 are rounded away: between 1 and 2 there are 128 numbers.
    """
    norm.float()
    norm.register_forward_pre_hook(lambda module, given: (given[0].float(), *given[1:]))
    norm.register_forward_hook(lambda module, given, found: found.to(dtype))


def freeze_below(model: nn.Module, above: int) -> None:
    """Freeze the embeddings and the layers below `above`; a head that shares the embeddings' table is frozen too."""
    for name, parameter in plain(model).named_parameters():
        layer = _LAYER.search(name)
        if layer is not None and int(layer[1]) < above:
            parameter.requires_grad_(False)
    embeddings_of(model).weight.requires_grad_(False)


def trained(model: nn.Module) -> Trained:
    """Return how much of `model` is trained. Raises InputError where nothing is."""
    own = [p for p in model.parameters() if p.requires_grad]
    if not own:
        raise InputError("nothing is left to train: the memory layer is the last one, and all below it is frozen")
    return Trained(len(own), sum(p.numel() for p in own), sum(p.numel() for p in model.parameters()))


def matrices(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield the trained parameters, and whether Muon is for them: matrices that are no tables of tokens."""
    tables = {id(embeddings_of(model).weight)}
    head: Any = plain(model).get_output_embeddings()
    if head is not None:
        tables.add(id(head.weight))
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter, parameter.ndim == 2 and id(parameter) not in tables


def _norms(model: nn.Module, above: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules of norms in the layers from `above` on, and behind them."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "norm" not in name.rpartition(".")[2].lower() or not own or any(p.ndim != 1 for p in own.values()):
            continue
        layer = _LAYER.search(f"{name}.")
        if layer is None or int(layer[1]) >= above:
            yield name, module
