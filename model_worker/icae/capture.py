"""The K-V that one forward computes, by layer, differentiably: keys before RoPE, as they are stored."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import RetrievedKV
from model_worker.attachment.probe import LAYOUTS
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
            report, projected = attachment.reports[layer], self.projections.get(layer)
            if report.layout is not None and projected is not None:
                key = LAYOUTS[report.layout](projected, report.kv_heads, report.head_dim)
            elif attachment.ropes[layer].rotates:
                rotation = self.rotations.get(layer) or attachment.ropes[layer].cos_sin(positions)
                key = attachment.ropes[layer].unrotate(key, *rotation)
            found[layer] = key[:, :, -last:], value[:, :, -last:]
        return found
