"""What a training leaves: a model's folder, or the folder of an adapter, each with how its memory is to be used."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model_worker.attachment.digest import Reader

MODEL, ADAPTER, ENTRY = "model", "adapter", "kvbank.json"
_BOUND = ("architecture", "weights", "rope")  # parts of the base's reader digest that an adapter is bound to


def write_model(folder: Path, model: Any, tokenizer: Any, entry: Mapping[str, Any]) -> None:
    """Write weights, tokenizer and configuration of a model. entry: the `kvbank` entry of the configuration."""
    model.config.kvbank = dict(entry)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_adapter(folder: Path, model: Any, entry: Mapping[str, Any], base: Reader, name: str) -> None:
    """Write the adapter of a peft model.

    base: the reader digest of the model without it, to which the adapter is bound. name: how the base is called.
    """
    model.save_pretrained(folder)
    said = {
        "kind": "kvbank memlong",
        "version": 1,
        "base": name,
        "base_parts": {part: base.parts[part] for part in _BOUND},
        "kvbank": dict(entry),
    }
    (folder / ENTRY).write_text(json.dumps(said, indent=2) + "\n")


def gates_entry(gates: Mapping[int, Tensor]) -> dict[str, Any]:
    """Return gates by layer as an entry of a configuration; empty without gates."""
    if not gates:
        return {}
    return {"gates": {str(layer): [float(value) for value in gate.detach()] for layer, gate in gates.items()}}
