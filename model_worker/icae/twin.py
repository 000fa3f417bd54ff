"""A second module object over the same weights.

An encoder with LoRA and a decoder without it cannot be one object: when gradient checkpointing recomputes a layer in
the backward pass, the switch that turned the adapter off is on again, and gradients are silently wrong (reentrant) or
refused (not reentrant). Two objects over one set of tensors cost no memory and cannot be confused.
"""

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from model_worker.attachment.backends import PREFIX
from model_worker.attachment.model_parts import config_of


def shared_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """Return, by id of each parameter of `model`, a frozen one over the same storage; tied ones stay tied.

    Give the same table to several twins, and they share parameter objects too: `.to()` moves them together.
    """
    return {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}


def twin(model: nn.Module, parameters: dict[int, nn.Parameter]) -> Any:
    """Copy `model` over `parameters`: no hook and no buffer in common with it, and none of its weights copied.

    Buffers are copied as they are, so that those outside the state dict (rotary frequencies) are right too.
    """
    memo: dict[int, Any] = dict(parameters)
    for module in model.modules():
        for name, value in vars(module).items():
            if "hooks" in name and isinstance(value, dict):  # a memory attached to `model` is not the twin's
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor):  # kept outside of buffers; a graph cannot be copied
                memo[id(value)] = value.detach().clone()
    made = copy.deepcopy(model, memo)
    made.requires_grad_(False)
    return made.eval()


def without_memory(made: Any) -> Any:
    """Give a twin its own attention, where it was made of a model with a memory, and return it."""
    used = str(made.config._attn_implementation)
    if used.startswith(PREFIX):
        made.set_attn_implementation(used.removeprefix(PREFIX))
    return made


def without_dropout(model: nn.Module) -> None:
    """Make train mode compute what eval mode does: gradient checkpointing needs train mode, a reader has no dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropout(module)
    _zero_dropout(config_of(model))


def _zero_dropout(thing: object) -> None:
    """Set every number of `thing` that is called a dropout to 0."""
    for name, value in vars(thing).items():
        if "dropout" in name and isinstance(value, float):
            setattr(thing, name, 0.0)
