"""What an ICAE adapter takes from its base: two twins of it, first rows, and what its configuration says."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.model_parts import config_of, embeddings_of, head_of
from model_worker.errors import InputError
from model_worker.icae.config import IcaeConfig
from model_worker.icae.twin import shared_parameters, twin, without_dropout, without_memory


def twins_of(base: nn.Module) -> tuple[Any, Any]:
    """Return two twins of `base`: the encoder before it has LoRA, and the decoder.

    Raises InputError for a base that has an adapter already, or is no causal LM.
    """
    if hasattr(base, "peft_config") or any(hasattr(module, "base_layer") for module in base.modules()):
        raise InputError("the base has an adapter already; ICAE takes a bare causal LM (merge the adapter first)")
    if not hasattr(base, "get_output_embeddings") or head_of(base) is None:
        raise InputError(f"{type(base).__name__} is not a causal LM: it has no language-model head")
    parameters = shared_parameters(base)
    inner, decoder = (without_memory(twin(base, parameters)) for _ in range(2))
    without_dropout(decoder)
    return inner, decoder


def first_rows(decoder: Any, config: IcaeConfig, seed: int) -> Tensor:
    """Draw the rows `[k + 3, d]` that training begins with, as wide as the embeddings and by default as spread."""
    table = table_of(decoder).detach()
    width = table.shape[1]
    rows = torch.randn(config.slots + 3, width, generator=torch.Generator().manual_seed(seed))
    if config.memory_init == "embedding_std":
        pieces = [piece.double() for piece in torch.split(table, 1 << 12)]
        mean = sum(float(piece.sum()) for piece in pieces) / table.numel()
        rows *= (sum(float(((piece - mean) ** 2).sum()) for piece in pieces) / table.numel()) ** 0.5
    return rows.to(decoder.device)


def table_of(base: nn.Module) -> Tensor:
    """Return the input embeddings, `[V, d]`."""
    return embeddings_of(base).weight


def dtype_of(base: nn.Module) -> str:
    """Return the name of the base's dtype, for a message."""
    return str(getattr(base, "dtype", "unknown")).removeprefix("torch.")


def positions_of(base: nn.Module) -> int | None:
    """Return how many positions the base was made for; None where its configuration does not say."""
    said = getattr(config_of(base), "max_position_embeddings", None)
    return said if isinstance(said, int) and said > 0 else None


def name_of(base: nn.Module) -> str:
    """Return the name of the base, where that is a hub id and not a folder of this machine; else an empty text."""
    name = str(getattr(config_of(base), "_name_or_path", "") or "")
    return "" if Path(name).exists() else name


def token_of(model: Any, name: str) -> int | None:
    """Return a special id of the model's configuration, the first where it has several; None where it has none."""
    said = getattr(model.config, name, None)
    return said[0] if isinstance(said, list | tuple) else said
