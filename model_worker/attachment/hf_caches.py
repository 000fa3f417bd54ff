"""The classes of transformers that the worker's caches are made of, with the types that transformers does not state.

At run time these are transformers' own; what is declared here is only what the worker overrides or calls.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    class DynamicLayer:
        """The keys and values `[B, Hkv, L, D]` of one layer, which grow with every forward."""

        keys: Tensor
        values: Tensor

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            """Take dtype and device from the first keys and values."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Append keys and values, and return all of them."""
            raise NotImplementedError

        def get_seq_length(self) -> int:
            """Return how many tokens the layer has seen."""
            raise NotImplementedError

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Return length and offset of the mask for `query_length` new tokens."""
            raise NotImplementedError

        def reset(self) -> None:
            """Forget all tokens of the layer."""

    class DynamicSlidingWindowLayer(DynamicLayer):
        """A layer that keeps the tokens of its sliding window."""

    class Cache:
        """One layer after another, of which each keeps what a decoder layer computed."""

        layers: list[Any]

        def __init__(self, layers: Sequence[Any]):
            """Take the layers, which follow each other as the decoder's do."""

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            """Append to one layer, and return all that it holds."""
            raise NotImplementedError

        def get_seq_length(self, layer_idx: int = 0) -> int:
            """Return how many tokens the cache has seen."""
            raise NotImplementedError

        def reset(self) -> None:
            """Forget all tokens of all layers."""

        def reorder_cache(self, beam_idx: Tensor) -> None:
            """Give each row the past of the beam that it goes on from."""

    class DynamicCache(Cache):
        """A cache whose layers are made as a model's configuration says, or as tokens come in."""

        def __init__(self, *, config: Any = None):
            """Make the layers of this configuration; without one, of no sliding windows."""

else:
    from transformers import Cache, DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["Cache", "DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer"]
