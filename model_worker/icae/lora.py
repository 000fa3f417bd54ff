"""LoRA of an adapter's folder, peft's two files: taken whole and as it was trained, or refused.

peft takes what it finds: it leaves a missing tensor untrained with a warning, copies one that has a name of the base
into the base, and follows settings that alter the base while LoRA is put on it (`init_lora_weights="olora"`, a bias).
The base shares its memory with the caller's model. So settings and names are looked at before peft is given them.
"""

import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model_worker.errors import InputError
from model_worker.icae import folder as files

# What an adapter may choose; whatever else peft knows stays as peft has it.
_CHOSEN = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
    }
)
_NAMES = frozenset({"task_type", "base_model_name_or_path", "revision", "peft_version", "inference_mode"})


def read(peft: Any, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """peft's configuration and tensors by name. Raises InputError for what is damaged, or no plain LoRA."""
    try:
        said = json.loads((folder / files.ADAPTER_CONFIG).read_text())
        tensors = load_file(folder / files.ADAPTER)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the adapter in {folder} is damaged: {error}") from None
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        raise InputError(f"the adapter in {folder} is no LoRA")
    usual = asdict(peft.LoraConfig())
    for name, value in sorted(said.items()):
        if name not in _CHOSEN | _NAMES and value != usual.get(name) and (name in usual or value):
            raise InputError(f"the adapter in {folder} is no plain LoRA: its {name} is {value!r}")
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            raise InputError(f"the adapter in {folder} is damaged: {name} is of {tensor.dtype}")
    check_scale(said.get("lora_alpha"), said.get("lora_dropout"))
    known = {own.name for own in fields(peft.LoraConfig)}
    return peft.LoraConfig(**{name: said[name] for name in said if name in _CHOSEN & known}), tensors


def check_scale(alpha: Any, dropout: Any) -> None:
    """Raises InputError for an alpha or a dropout that is none."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (alpha, dropout))
    if not numbers or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        raise InputError(f"alpha is a number above 0, dropout one from 0 to below 1, not {alpha} and {dropout}")


@torch.no_grad()
def put(peft: Any, encoder: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Give the peft model `encoder` these weights. Raises InputError for other names or shapes than it has."""
    wanted = set(peft.get_peft_model_state_dict(encoder, save_embedding_layers=False))
    if other := sorted(wanted ^ set(tensors)):
        where = "lacks" if other[0] in wanted else "has, beyond what the model takes,"
        raise InputError(f"the adapter in {folder} does not fit this model: it {where} {other[0]}")
    try:
        peft.set_peft_model_state_dict(encoder, tensors)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the adapter in {folder} does not fit this model: {_line(error)}") from None


def load(peft: Any, model: Any, folder: Path, *, trainable: bool) -> Any:
    """`model` with the LoRA of the folder."""
    config, tensors = read(peft, folder)
    config.task_type, config.inference_mode = "CAUSAL_LM", not trainable
    try:
        encoder = peft.get_peft_model(model, config)
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"the adapter in {folder} does not fit this model: {_line(error)}") from None
    put(peft, encoder, tensors, folder)
    return encoder


def alike(one: Any, other: Any) -> bool:
    """Whether two configurations of peft make the same of the same weights."""
    return all(_plain(getattr(one, name, None)) == _plain(getattr(other, name, None)) for name in _CHOSEN)


def _plain(value: Any) -> Any:
    """Lists and sets of names alike, empty ones as none."""
    return (frozenset(value) if isinstance(value, list | set | tuple) else value) or None


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
