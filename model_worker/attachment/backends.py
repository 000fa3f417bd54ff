"""The attention functions that transformers calls in an attached model, and how one is set.

This file owns that a model computes as its own file says: the registered function asks that file for its backend, and
without a memory it calls the backend and nothing else.
"""

import sys
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model_worker.attachment.attention import Backend
from model_worker.attachment.model_parts import plain
from model_worker.attachment.view import ForwardView, not_compiled
from model_worker.errors import UnsupportedModel

BACKENDS = ("sdpa", "eager")
PREFIX = "kvbank_"  # in front of a backend's name: the same backend with a memory


def set_attention(model: nn.Module, name: str) -> None:
    """Have the model call the attention function of that name. Raises UnsupportedModel where it calls its own."""
    causal = plain(model)
    with suppress(ValueError):
        causal.set_attn_implementation(name)
    if causal.config._attn_implementation != name:
        raise UnsupportedModel(f"{type(causal).__name__} does not route its attention through transformers' interface")


def register(backend: str) -> str:
    """Register the attention of a backend with a memory, and return its name.

    Attention and mask stand under one name: without its mask function a model runs unmasked, and says nothing.
    """
    name = PREFIX + backend
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            dropout: float = 0.0,
            *,
            kvbank: ForwardView | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:
            # A wrapper of what is registered may hand dropout on by place, as kvpress does; the backends differ in
            # what stands there, so it goes to them by name.
            own, kwargs = own_attention(backend, module), {"dropout": dropout, **kwargs}
            if kvbank is None:
                return own(module, query, key, value, attention_mask, **kwargs)
            return _attend(kvbank, own, module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])
    return name


@not_compiled
def _attend(view: ForwardView, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return view.attend(*args, **kwargs)


def own_attention(backend: str, module: nn.Module) -> Backend:
    """Return the backend as the model's own file resolves it (eager differs from file to file: softcap, sinks)."""
    file = vars(sys.modules[type(module).__module__])
    own: Backend = (
        file["eager_attention_forward"]
        if backend == "eager"
        else file.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[backend]
    )
    return own
