"""One vector of a text is made here of the last hidden states of its tokens, and of linear layers behind them."""

import json
from pathlib import Path
from typing import Any

from model_worker.errors import InputError, first_line

# Activations of a dense layer, by the names of their classes in torch.
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")


def pooled(hidden: Any, mask: Any, pooling: str) -> Any:
    """Pool hidden states `[n, T, d]` under a mask `[n, T]` whose pads are on the right, to `[n, d]`.

    The row of a text without a token means nothing.
    """
    import torch

    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        last = (mask.sum(1) - 1).clamp(min=0)[:, None, None]
        return hidden.take_along_dim(last, 1)[:, 0]
    if pooling == "max":
        return hidden.masked_fill(mask[..., None] == 0, torch.finfo(hidden.dtype).min).amax(1)
    weights = mask[..., None]
    counts = weights.sum(1).clamp(min=1)
    return (hidden * weights).sum(1) / (counts.sqrt() if pooling == "mean_sqrt_len" else counts)


def dense_layer(folder: Path) -> Any:
    """Load the linear layer and activation of a folder. Raises InputError for one that there is not here."""
    import torch

    try:
        said = json.loads((folder / "config.json").read_bytes())
        layer = torch.nn.Linear(said["in_features"], said["out_features"], bias=said.get("bias", True))
        weights = {name.removeprefix("linear."): tensor for name, tensor in _weights(folder).items()}
        layer.load_state_dict(weights)
    except Exception as error:  # the files of others, read by libraries that fail with whatever they run into
        raise InputError(
            f"the dense layer {folder} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    activation = str(said.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise InputError(f"{folder} asks for an activation that there is not here: {activation}")
    if said.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise InputError(f"{folder} asks for an input that there is not here: {said['module_input_name']}")
    return torch.nn.Sequential(layer, getattr(torch.nn, activation)()).eval()


def _weights(folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    found: dict[str, Any] = (
        load_file(path)
        if path.is_file()
        else torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    )
    return found
