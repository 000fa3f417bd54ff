"""The attention of one node of a tree, over unrotated queries and keys."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import Backend
from model_worker.attachment.model_parts import layer_of
from model_worker.attachment.view import ForwardView
from model_worker.homer.tokens import Prefix


class NodeView(ForwardView):
    """One node's pass through some decoder layers, which are called with angles of 0.

    Each layer's queries and keys are rotated here to `positions` `[n]`, the prefix `before` is put in front, and the
    K-V of the `wanted` layers (None: of all) are kept before RoPE. With `score`, layer `last` leaves `significance`
    `[n]`: the largest logit over heads that the node's last token gives each token.
    """

    def __init__(
        self,
        attachment: Attachment,
        positions: Tensor,
        before: Prefix,
        wanted: Collection[int] | None = None,
        last: int = -1,
        score: bool = False,
    ):
        super().__init__()
        self.attachment, self.positions, self.before = attachment, positions, before
        self.wanted, self.last, self.score = wanted, last, score
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.significance: Tensor | None = None

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
        """Compute the attention of one layer, whose query and key come unrotated."""
        layer = layer_of(module)
        if self.wanted is None or layer in self.wanted:
            self.keys[layer], self.values[layer] = key[0], value[0]
        rope = self.attachment.ropes[layer]
        query, key = (rope.rotate(x, self.positions[None]) for x in (query, key))
        if self.score and layer == self.last:
            self.significance = logits(query[:, :, -1:], key, self.attachment.reports[layer].scaling)[0, :, 0].amax(0)
        first = len(self.before)
        if first:
            front = torch.arange(first, device=key.device)[None]
            key = torch.cat([rope.rotate(self.before.keys[layer][None], front), key], dim=2)
            value = torch.cat([self.before.values[layer][None], value], dim=2)
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril(first)[None, None]
        return backend(module, query, key, value, self.attachment.as_mask(seen, query), **kwargs)


def logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Return the attention logits before softmax, `[B, Hq, Q, L]` in float32, of rotated tensors."""
    rows, heads, queries, dim = query.shape
    grouped = query.float().reshape(rows, key.shape[1], -1, dim)
    return (grouped @ key.float().transpose(2, 3)).view(rows, heads, queries, -1) * scaling
