"""What the tensors of a stored chunk are: a payload on its way to the service, and K-V or memory slots on the way back.

This file owns their names (`k.<layer>`, `v.<layer>`, `pos.<layer>`, or `soft`) and what a model makes of soft tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

import kvbank
from model_worker.attachment.attachment import Attachment
from model_worker.compress.base import Payload
from model_worker.errors import BankMismatch, InputError
from model_worker.icae.expanded import expanded
from model_worker.tensors import to_numpy, to_torch
from model_worker.window.capture import Layers

if TYPE_CHECKING:
    from model_worker.icae import Icae, Slots


def tensors_of(payload: Payload, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """As the service takes them, in the bank's `dtype`."""
    if payload.soft is not None:
        return {"soft": to_numpy(payload.soft.to(dtype))}
    tensors = {}
    for layer, (keys, values, offsets) in payload.layers.items():
        tensors[f"k.{layer}"] = to_numpy(keys.to(dtype))
        tensors[f"v.{layer}"] = to_numpy(values.to(dtype))
        tensors[f"pos.{layer}"] = to_numpy(offsets.to(torch.int32))
    return tensors


def layers_of(tensors: Mapping[str, np.ndarray], attachment: Attachment) -> Layers:
    """K-V of the memory layers: as stored, or as the frozen model makes them of soft tokens."""
    if "soft" in tensors:
        return expanded(to_torch(tensors["soft"]), attachment)
    parts = ("k", "v", "pos")
    layers = attachment.plan.memory_layers
    return {x: tuple(to_torch(tensors[f"{part}.{x}"]) for part in parts) for x in layers}  # type: ignore[misc]


def slots_of(chunk: kvbank.Chunk, attachment: Attachment, icae: "Icae") -> "Slots":
    """What the frozen model reads of a chunk beside the rows of `icae`. Errors: see `Memory.slots`."""
    from model_worker.icae.slots import Slots

    assert chunk.tensors is not None
    producer = chunk.producer or kvbank.Producer("")
    whole = producer.method == "none" and not producer.adapter_digest
    if not whole and not producer.adapter_digest:
        raise InputError(f"chunk {chunk.chunk_id} holds no memory slots: it was stored by {producer.method!r}")
    if not whole and producer.adapter_digest != icae.digest:
        raise BankMismatch(
            f"chunk {chunk.chunk_id} was made by another ICAE adapter (digest {producer.adapter_digest}, this one is "
            f"{icae.digest})"
        )
    source, device = (chunk.original_length,), icae.device
    if icae.config.interface == "soft":
        if not whole and "soft" not in chunk.tensors:
            raise InputError(f"chunk {chunk.chunk_id} holds K-V of its slots, not the slots; write with payload=soft")
        if whole and not chunk.token_ids:
            raise InputError(f"chunk {chunk.chunk_id} was not compressed, and its tokens are not stored")
        soft = icae.embed(chunk.token_ids) if whole else to_torch(chunk.tensors["soft"]).to(device, icae.dtype)
        return Slots(soft, None, source, torch.arange(len(soft), device=device))
    if len(attachment.plan.memory_layers) < len(attachment.reports):
        raise InputError(
            f"chunk {chunk.chunk_id} holds K-V of layers {attachment.plan.memory_layers} alone; to read slots the "
            "model needs those of all its layers"
        )
    layers = layers_of(chunk.tensors, attachment)
    positions = next(iter(layers.values()))[2].to(device).long()
    pairs = {x: (keys.to(device, icae.dtype), values.to(device, icae.dtype)) for x, (keys, values, _) in layers.items()}
    return Slots(None, pairs, source, positions)
