"""The parts of a transformers model that the worker reaches into: its configuration, its decoder, its embeddings.

transformers states no types: what comes from it is `Any`, and what is known of its type is stated here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def plain(model: nn.Module) -> Any:
    """Return the transformers model inside a peft wrapper, or `model` itself."""
    inside: Any = model
    return inside.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: nn.Module) -> Any:
    """Return the stack of layers below the language-model head."""
    return plain(model).base_model


def config_of(model: nn.Module) -> Any:
    """Return the configuration of a transformers model, wrapped by peft or not."""
    holder: Any = model
    return holder.config


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter is, and with it the inputs of a forward."""
    return next(model.parameters()).device


def embeddings_of(model: nn.Module) -> nn.Embedding:
    """Return the table of input embeddings, `[vocabulary, hidden]`."""
    holder: Any = model
    table: nn.Embedding = holder.get_input_embeddings()
    return table


def head_of(model: nn.Module) -> Any:
    """Return the language-model head: hidden states `[..., hidden]` in, logits `[..., vocabulary]` out."""
    holder: Any = model
    return holder.get_output_embeddings()


def layer_of(attention: nn.Module) -> int:
    """Return the number of the decoder layer that an attention module belongs to, counted from 0."""
    module: Any = attention
    return int(module.layer_idx)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while, without dropout and checkpointing, and each module of the model back into
    its own mode afterwards.

    Checkpointing matters too: a layer that is recomputed in train mode drops its cache.
    """
    modes = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in modes):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # a model may do more than to note its mode
        for module, training in modes:
            module.training = training
