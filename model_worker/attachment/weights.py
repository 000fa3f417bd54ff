"""The weights of a reader: all that a forward reads besides its input, tensor by tensor.

Parameters and persistent buffers count, and what a module adds to the state dict on its own (packed weights). Buffers
that the model's own initialisation derives from its configuration do not, since the configuration counts; one that was
changed by hand does. So do modules that are not those which the configuration builds. A tensor that stands in none of
these places could change unseen: a model that has one is refused, by name.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model_worker.errors import UnsupportedModel

# A rotation that follows the length of the input (longrope, dynamic) keeps its frequencies of the moment in a buffer
# beside the original ones, and in plain attributes what it computed them from. All follows from the configuration.
_FREQUENCIES, _ORIGINAL = "inv_freq", "original_inv_freq"
_FOLLOWS_LENGTH = ("longrope", "dynamic")


@dataclass(slots=True)
class Weights:
    """The named tensors of a model that count.

    base: parameters of the model itself, under their plain names. adapters: those that peft layers added. others: all
    else that counts, tensors and plain values; empty for most models.
    """

    base: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


def weights_of(model: nn.Module, causal: Any) -> Weights:
    """Collect what counts in `model`; `causal` is the transformers model inside a peft wrapper, or `model` itself.

    Raises UnsupportedModel for tensors that cannot be read (offloaded), and for those that stand where no weights are
    expected.
    """
    found = Weights()
    tuners = [name for name, module in model.named_modules() if is_tuner(module)]
    for name, parameter in model.named_parameters():
        if _is_added(name, tuners):
            found.adapters[name] = parameter
        else:
            found.base[_plain_name(name)] = parameter
    known = {id(parameter) for parameter in model.parameters()}
    for prefix, module in model.named_modules():
        for name, buffer in _counting_buffers(module, causal):
            found.others[_plain_name(f"{prefix}.{name}")] = buffer
        known |= {id(buffer) for buffer in module._buffers.values()}
        found.others |= _added_to_the_state_dict(prefix, module, known)
        _refuse_hidden_tensors(prefix, module, model)
    found.others |= {f"module {name}": kind for name, kind in _other_modules(model, causal).items()}
    for name, tensor in {**found.base, **found.adapters, **found.others}.items():
        if isinstance(tensor, Tensor) and tensor.device.type == "meta":
            raise UnsupportedModel(f"the weight {name} is not in memory (offloaded): its value cannot be known")
    return found


def is_tuner(module: nn.Module) -> bool:
    """Tell whether `module` is a peft layer around one of the model's, or a choice between that and a trained copy."""
    return any(name in module._modules for name in _WRAPPED[:2])


def live_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of `module` itself that no forward changes."""
    found: list[Tensor] = [parameter for parameter in module._parameters.values() if parameter is not None]
    if module._buffers:
        skipped = _of_the_moment(module)
        found += [b for name, b in module._buffers.items() if b is not None and name not in skipped]
    return found


# Where the model's own part stands in what wraps it: peft's layers and choices, and torch.compile.
_WRAPPED = ("base_layer", "original_module", "_orig_mod")


def _is_added(name: str, tuners: list[str]) -> bool:
    """Tell whether what is called `name` came with an adapter."""
    owner = next((tuner for tuner in tuners if name.startswith(f"{tuner}.")), None)
    return owner is not None and not any(name.startswith(f"{owner}.{part}.") for part in _WRAPPED)


def _plain_name(name: str) -> str:
    """Return the name in the model itself, whatever wraps it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED).removeprefix("base_model.model.")


def _of_the_moment(module: nn.Module) -> set[str]:
    """Return the names of buffers whose values follow the length of the last input."""
    if not _follows_length(module):
        return set()
    return {name for name in module._buffers if name.endswith(_FREQUENCIES) and not name.endswith(_ORIGINAL)}


def _follows_length(module: nn.Module) -> bool:
    """Tell whether the rotation of `module` follows the length of the input."""
    types = getattr(module, "rope_type", None)
    kinds = types.values() if isinstance(types, dict) else [types]
    return any(kind in _FOLLOWS_LENGTH for kind in kinds)


def _counting_buffers(module: nn.Module, causal: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield names and buffers of `module` that do not follow from the configuration, or were changed since."""
    derived = module._non_persistent_buffers_set - _of_the_moment(module)
    initial = _initialised_again(module, causal) if derived else {}
    for name, buffer in module._buffers.items():
        if buffer is None or name in _of_the_moment(module):
            continue
        again = initial.get(name) if name in derived else None
        if again is None or not _equal(buffer, again):
            yield name, buffer


def _initialised_again(module: nn.Module, causal: Any) -> Mapping[str, Tensor | None]:
    """Return the buffers of `module` as transformers fills them after loading, from the configuration alone."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    meta = {name: None if p is None else nn.Parameter(p.to("meta"), False) for name, p in module._parameters.items()}
    # In float32, as they are made: a model that was cast afterwards computes with rounded ones, and is another reader.
    fresh = {
        name: None if b is None else torch.full_like(b, 0, dtype=torch.float32 if b.is_floating_point() else b.dtype)
        for name, b in module._buffers.items()
    }
    twin.__dict__ |= {"_parameters": meta, "_buffers": fresh}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            causal._init_weights(twin)
    except Exception:  # of foreign code: then its buffers count
        return {}
    return fresh


def _equal(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are equal in the dtype of `b`."""
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def _added_to_the_state_dict(prefix: str, module: nn.Module, known: set[int]) -> dict[str, Any]:
    """Return what `module` writes into the state dict by code of its own, as quantised modules do."""
    if not _writes_its_own_state(module):
        return {}
    written: dict[str, Any] = {}
    module._save_to_state_dict(written, f"{prefix}.", keep_vars=True)
    return {_plain_name(name): value for name, value in written.items() if id(value) not in known}


def _writes_its_own_state(module: nn.Module) -> bool:
    """Tell whether `module` has code of its own for its part of the state dict."""
    own = type(module)
    return any(
        getattr(own, name) is not getattr(nn.Module, name) for name in ("_save_to_state_dict", "get_extra_state")
    )


def _refuse_hidden_tensors(prefix: str, module: nn.Module, model: nn.Module) -> None:
    """Raise UnsupportedModel for a tensor that is neither parameter nor buffer nor a part of either."""
    if _writes_its_own_state(module) or _follows_length(module):
        return
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        for tensor in _tensors_in(value):
            if not _is_part_of_known(tensor, model):
                raise UnsupportedModel(
                    f"{prefix or type(model).__name__}.{name} is a tensor that is neither a parameter nor a buffer: it "
                    "could change unseen; register it as a buffer"
                )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors and numeric arrays in an attribute, however nested in plain containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield torch.from_numpy(value)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors_in(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _tensors_in(part)


def _is_part_of_known(tensor: Tensor, model: nn.Module) -> bool:
    """Tell whether `tensor` shares its storage with a parameter or buffer of the model, or is empty."""
    if tensor.numel() == 0:
        return True
    place = tensor.untyped_storage().data_ptr()
    return any(place == t.untyped_storage().data_ptr() for m in model.modules() for t in live_tensors(m))


def _other_modules(model: nn.Module, causal: Any) -> dict[str, str]:
    """Return, by name, the classes of modules of `causal` that are not those which its configuration builds."""
    tuners = [name for name, module in causal.named_modules() if is_tuner(module)]
    present = {}
    for name, module in causal.named_modules():
        if name not in tuners and not _is_added(f"{name}.", tuners):
            present[_plain_name(f"{name}.").rstrip(".")] = type(module).__qualname__
    built = _built_again(_Design(type(causal), json.dumps(causal.config.to_dict(), default=str), causal.config))
    missing = {name: "missing" for name in built if name not in present}
    return {name: kind for name, kind in present.items() if built.get(name) != kind} | missing


@dataclass(frozen=True, slots=True)
class _Design:
    """What a model is built from: its class and its configuration. Designs are equal that say the same."""

    kind: type[nn.Module]
    said: str
    config: Any = field(compare=False)


# A process attaches few designs, some of them again and again (each conversation, each run of an evaluation).
@lru_cache(maxsize=16)
def _built_again(design: _Design) -> dict[str, str]:
    """Return, by name, the classes of modules that a design builds, without memory for their weights."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            fresh = design.kind(copy.deepcopy(design.config))
    except Exception:  # of foreign code: then all classes count
        return {}
    return {name: type(module).__qualname__ for name, module in fresh.named_modules()}
