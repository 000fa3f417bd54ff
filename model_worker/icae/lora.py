"""The LoRA of an adapter's folder, peft's two files: taken whole and as it was trained, or refused.

peft takes what it finds: it leaves a missing tensor untrained with a warning, copies one that has a name of the base
into the base, whose memory the caller's model shares, and follows settings by which the same weights make other slots.
So settings and tensors are looked at first, and only `_CHOSEN` settings ever reach it.
"""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model_worker.attachment.with_peft import put
from model_worker.errors import InputError, first_line
from model_worker.icae import folder as files

# The settings that an adapter may choose; all others stay as peft has them.
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
# Settings that say nothing of the slots.
_ABOUT = frozenset(
    {"task_type", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"}
    | {"megatron_core"}
)
_STARTS = (True, False, "gaussian")  # values of init_lora_weights that leave the base as it is


def read(peft: Any, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read peft's configuration and tensors by name. Raises InputError for what is damaged, or no plain LoRA."""
    try:
        said = json.loads((folder / files.ADAPTER_CONFIG).read_text())
        tensors = load_file(folder / files.ADAPTER)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"the adapter in {folder} is damaged: {first_line(error)}") from None
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        raise InputError(f"the adapter in {folder} is no LoRA")
    if odd := _odd(said, asdict(peft.LoraConfig())):
        raise InputError(f"the adapter in {folder} is no plain LoRA: its {odd} is {said[odd]!r}")
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            raise InputError(f"the adapter in {folder} is damaged: {name} is of {tensor.dtype}")
    check_scale(said.get("lora_alpha"), said.get("lora_dropout", 0.0))
    try:
        return peft.LoraConfig(**{name: said[name] for name in said if name in _CHOSEN}), tensors
    except (TypeError, ValueError) as error:
        raise InputError(f"the adapter in {folder} is damaged: {first_line(error)}") from None


def _odd(said: dict[str, Any], usual: dict[str, Any]) -> str | None:
    """Return the first setting that is neither as usual nor the adapter's to choose; empty and None count alike."""
    for name, value in sorted(said.items()):
        fine = value in _STARTS if name == "init_lora_weights" else value == usual.get(name)
        if not fine and name not in _CHOSEN | _ABOUT | {"peft_type"} and (value or usual.get(name)):
            return name
    return None


def check_scale(alpha: Any, dropout: Any) -> None:
    """Raise InputError for an alpha or a dropout that is none."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (alpha, dropout))
    if not numbers or not 0 < alpha <= sys.float_info.max or not 0 <= dropout < 1:
        raise InputError(f"alpha is a number above 0, dropout one from 0 to below 1, not {alpha} and {dropout}")


def load(peft: Any, model: Any, folder: Path, *, trainable: bool) -> Any:
    """Return `model` with the LoRA of the folder. Raises InputError where that does not fit it."""
    config, tensors = read(peft, folder)
    config.task_type, config.inference_mode = "CAUSAL_LM", not trainable
    try:
        encoder = peft.get_peft_model(model, config)
    except (ValueError, RuntimeError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"the adapter in {folder} does not fit this model: {first_line(error)}") from None
    put(peft, encoder, tensors, folder)
    return encoder


def alike(one: Any, other: Any) -> bool:
    """Tell whether two configurations of peft make the same of the same weights."""
    return all(_plain(getattr(one, name)) == _plain(getattr(other, name)) for name in _CHOSEN)


def _plain(value: Any) -> Any:
    """Return a setting in a form to compare: lists and sets of names alike, empty ones as None."""
    return (frozenset(value) if isinstance(value, list | set | tuple) else value) or None
