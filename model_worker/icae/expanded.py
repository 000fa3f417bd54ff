"""Soft tokens as the K-V that the frozen model makes of them: what a chunk's slots are where attention recalls them."""

import torch
from torch import Tensor

from model_worker.attachment.attachment import Attachment
from model_worker.icae.decode import to_kv
from model_worker.window.capture import Layers


def expanded(soft: Tensor, attachment: Attachment) -> Layers:
    """Return the K-V of the memory layers from one forward of the frozen model over a chunk's soft tokens, `[n, d]`.

    The soft tokens stand at the first places of the chunk. Several chunks so expanded are an approximation: each is
    alone in its forward, so that in deeper layers none has seen those before it, as it would have if the model read one
    behind the other (`Memory.slots` is for that).
    """
    offsets = torch.arange(len(soft), dtype=torch.int32)
    return {layer: (*pair, offsets) for layer, pair in to_kv(attachment, soft, attachment.plan.memory_layers).items()}
