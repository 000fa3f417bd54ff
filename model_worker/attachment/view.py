"""What one forward carries to its attention layers, and what they leave in it.

The state rides on the cache object that the caller passes as `past_key_values`; a pre-hook on the decoder turns it into
the forward keyword `kvbank`, which transformers hands down to the attention function. Nothing lives on the modules, so
threads do not meet.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model_worker.attachment.attention import Backend, RetrievedKV, retrieval_causal_attention
from model_worker.attachment.model_parts import layer_of

_current = threading.local()
_F = TypeVar("_F", bound=Callable[..., Any])


def not_compiled(function: _F) -> _F:
    """Leave `function` out of the graphs of torch.compile, with all that it calls.

    A memory asks a service, waits and keeps state: a graph that was traced through it would keep what it found first.
    """
    disable: Callable[..., _F] = torch.compiler.disable  # torch states no types for it
    return disable(function, reason="a memory is no part of a graph")


class ForwardView:
    """One forward as its attention layers see it: what was retrieved for them, and what they leave for the memory.

    retrieved: K-V by layer. rotations, projections: cosines and sines, and the output of `k_proj` or `k_norm`, by
    memory layer, as the hooks noted them.
    """

    def __init__(self, retrieved: Mapping[int, RetrievedKV] | None = None):
        self._retrieved = retrieved or {}
        self.rotations: dict[int, tuple[Tensor, Tensor]] = {}
        self.projections: dict[int, Tensor] = {}

    def retrieved(self, layer: int) -> RetrievedKV | None:
        """Return what `layer` attends to besides its local context; None for nothing."""
        return self._retrieved.get(layer)

    def attend(
        self,
        backend: Backend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of one layer, called as `backend` would be; query and key are rotated."""
        self.observe(module, query, key, value, kwargs)
        layer = layer_of(module)
        given = {"grows": self.grows(layer), **kwargs}
        return retrieval_causal_attention(backend, module, query, key, value, mask, self.retrieved(layer), **given)

    def grows(self, layer: int) -> bool:
        """Tell whether local keys and values of `layer` stay as they are while tokens come in behind them."""
        return False

    def observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Look at one layer's tensors, rotated, before they are attended to; this class does nothing with them."""


class ForwardState(ABC):
    """A cache that takes part in a forward of one attached model, whose decoder's pre-hook calls it.

    attachment: the attachment that the cache was made for; the hook compares identities and asks nothing of it.
    """

    attachment: object

    @abstractmethod
    def before_forward(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the decoder's keywords, with positions made explicit and the view added as `kvbank`."""


@not_compiled
def enter_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the rotation of a memory layer, and to which forward its projections belong: a pre-hook of its attention."""
    view = kwargs.get("kvbank")
    _current.view = view
    if view is not None:
        _current.layer = layer_of(module)
        if kwargs.get("position_embeddings") is not None:
            view.rotations[_current.layer] = kwargs["position_embeddings"]


@not_compiled
def leave_attention(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
    """End what `enter_attention` began: a hook after a memory layer's attention, also when that failed."""
    _current.view = None


@not_compiled
def note_projection(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Keep the output of `k_proj` or `k_norm`, which is the unrotated key up to its layout: a hook after either."""
    view = getattr(_current, "view", None)
    if view is not None:
        view.projections[_current.layer] = output
