"""The K-V that one forward computes, by layer, differentiably: keys before RoPE, as they are stored."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import RetrievedKV
from model_worker.attachment.raw_keys import raw_keys
from model_worker.attachment.view import ForwardView


class KVView(ForwardView):
    """Goes through a forward as the keyword `kvbank`, and keeps what each layer computed.

    It only takes references during the forward: a checkpointed layer runs twice, and must save the same tensors both
    times.
    """

    def __init__(self, retrieved: Mapping[int, RetrievedKV] | None = None):
        super().__init__(retrieved)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]) -> None:
        self._seen[int(module.layer_idx)] = key, value  # type: ignore[arg-type]

    def taken(
        self, attachment: Attachment, layers: Iterable[int], positions: Tensor, last: int
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys before RoPE and values of the `last` columns, `[B, Hkv, last, D]` each, of a forward at `positions`."""
        found = {}
        for layer in layers:
            key, value = self._seen[layer]
            rope, rotation = attachment.ropes[layer], self.rotations.get(layer)
            if rotation is None and rope.rotates:
                rotation = rope.cos_sin(positions)
            key = raw_keys(attachment.reports[layer], rope, key, self.projections.get(layer), rotation)
            found[layer] = key[:, :, -last:], value[:, :, -last:]
        return found
