"""The attention inside a captured chunk, for the methods that choose by it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model_worker.window.capture import LayerCapture
from model_worker.window.selection import over_heads, received

if TYPE_CHECKING:
    from model_worker.attachment.attachment import Attachment


def observed(layer: LayerCapture, index: int, attachment: "Attachment", last: int, heads: str) -> Tensor:
    """Return the weight that each token gets from the chunk's `last` queries, mean over them and over `heads`.

    The weights are float32, `[1, S]` for heads `shared`, `[Hkv, S]` for `own`. The chunk stands at positions 0 to S-1.
    """
    assert layer.queries is not None
    rope, tokens = attachment.ropes[index], layer.keys.shape[1]
    last = min(last, tokens)
    positions = torch.arange(tokens, device=layer.keys.device)[None]
    key = rope.rotate(layer.keys[None].float(), positions)
    query = rope.rotate(layer.queries[None, :, -last:].float(), positions[:, -last:])
    weights = received(query, key, attachment.reports[index].scaling, last=last)
    return over_heads(weights, key.shape[1], heads)[0]
