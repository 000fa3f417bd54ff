"""What one forward carries to its attention layers, and what they leave in it.

The state rides on the cache object that the caller passes as `past_key_values`; a pre-hook on the decoder turns it into
the forward keyword `kvbank`, which transformers hands down to the attention function. Nothing lives on the modules, so
threads do not meet.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from model_worker.attachment.attention import Backend, RetrievedKV, retrieval_causal_attention

if TYPE_CHECKING:
    from model_worker.attachment.attachment import Attachment

_current = threading.local()
_F = TypeVar("_F", bound=Callable[..., Any])


def not_compiled(function: _F) -> _F:
    """Leave `function` out of the graphs of torch.compile, with all that it calls.

    A memory asks a service, waits and keeps state: a graph that was traced through it would keep what it found first.
    """
    disabled: _F = torch.compiler.disable(function, reason="a memory is no part of a graph")
    return disabled


class ForwardView:
    """Read side: retrieved K-V by layer. Write side: unrotated keys and queries of memory layers."""

    def __init__(self, retrieved: Mapping[int, RetrievedKV] | None = None):
        self._retrieved = retrieved or {}
        self.rotations: dict[int, tuple[Tensor, Tensor]] = {}
        self.projections: dict[int, Tensor] = {}

    def retrieved(self, layer: int) -> RetrievedKV | None:
        """What `layer` attends to besides its local context."""
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
        """The attention of one layer, as `backend` would be called; query and key are rotated."""
        self.observe(module, query, key, value, kwargs)
        retrieved = self.retrieved(int(module.layer_idx))  # type: ignore[arg-type]
        return retrieval_causal_attention(backend, module, query, key, value, mask, retrieved, **kwargs)

    def observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Called by the attention function with post-RoPE tensors, before attention."""


class ForwardState(ABC):
    """A cache that takes part in a forward of the model behind its `attachment`. The decoder's pre-hook calls it."""

    attachment: "Attachment"

    @abstractmethod
    def before_forward(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's keywords, with positions made explicit and the view added as `kvbank`."""


@not_compiled
def enter_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of a memory layer's attention: note the rotation, and whose forward the projections below belong to."""
    view = kwargs.get("kvbank")
    _current.view = view
    if view is not None:
        _current.layer = module.layer_idx
        if kwargs.get("position_embeddings") is not None:
            view.rotations[module.layer_idx] = kwargs["position_embeddings"]


@not_compiled
def leave_attention(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
    """Hook after a memory layer's attention, also when it failed."""
    _current.view = None


@not_compiled
def note_projection(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Hook of `k_proj` or `k_norm`: its output is the unrotated key up to layout."""
    view = getattr(_current, "view", None)
    if view is not None:
        view.projections[_current.layer] = output
