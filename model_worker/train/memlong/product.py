"""What a training leaves: a model's folder, or the folder of an adapter, each with how its memory is to be used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model_worker.attachment.adapter import AdapterEntry
from model_worker.attachment.with_peft import using_peft

MODEL, ADAPTER = "model", "adapter"


def write_model(folder: Path, model: Any, tokenizer: Any, entry: Mapping[str, Any]) -> None:
    """Write weights, tokenizer and configuration of a model. entry: the `kvbank` entry of the configuration."""
    model.config.kvbank = dict(entry)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_adapter(folder: Path, model: Any, entry: AdapterEntry) -> None:
    """Write the adapter of a peft model, and how it is to be used."""
    with using_peft("an adapter"):
        model.save_pretrained(folder, save_embedding_layers=False)
    entry.write(folder)


def gates_entry(gates: Mapping[int, Tensor]) -> dict[str, Any]:
    """Return gates by layer as an entry of a configuration."""
    return {"gates": {str(layer): [float(value) for value in gate.detach()] for layer, gate in gates.items()}}
