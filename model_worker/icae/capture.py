"""The K-V that one forward computes, differentiably: keys before RoPE, as they are stored, and values, by layer."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import RetrievedKV
from model_worker.attachment.model_parts import layer_of
from model_worker.attachment.raw_keys import raw_keys
from model_worker.attachment.view import ForwardView


class KVView(ForwardView):
    """A forward of which the keys and values of each layer are kept; it is passed as the keyword `kvbank`.

    Only references are taken during the forward: a checkpointed layer runs twice, and must save the same tensors both
    times.
    """

    def __init__(self, retrieved: Mapping[int, RetrievedKV] | None = None):
        super().__init__(retrieved)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]) -> None:
        self._seen[layer_of(module)] = key, value

    def taken(
        self, attachment: Attachment, layers: Iterable[int], positions: Tensor, last: int
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Return keys before RoPE and values `[B, Hkv, last, D]` of the `last` columns of a forward at `positions`."""
        found = {}
        for layer in layers:
            key, value = self._seen[layer]
            rope, rotation = attachment.ropes[layer], self.rotations.get(layer)
            if rotation is None and rope.rotates:
                rotation = rope.cos_sin(positions)
            key = raw_keys(attachment.reports[layer], rope, key, self.projections.get(layer), rotation)
            found[layer] = key[:, :, -last:], value[:, :, -last:]
        return found
