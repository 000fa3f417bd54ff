"""The tensors of a stored chunk: a payload on its way to the service, K-V or memory slots on the way back.

This file owns their names: `k.<layer>`, `v.<layer>` and `pos.<layer>` of each memory layer, or `soft`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import kvbank
from model_worker.attachment.attachment import Attachment
from model_worker.compress.base import Payload
from model_worker.errors import BankMismatch, InputError
from model_worker.icae.expanded import expanded
from model_worker.window.capture import Layers

if TYPE_CHECKING:
    from model_worker.icae import Icae, Slots


def tensors_of(payload: Payload, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a payload's tensors by name, as the service takes them: on the CPU, contiguous, in the bank's `dtype`."""
    if payload.soft is not None:
        return {"soft": _at_rest(payload.soft, dtype)}
    tensors = {}
    for layer, (keys, values, offsets) in payload.layers.items():
        tensors[f"k.{layer}"] = _at_rest(keys, dtype)
        tensors[f"v.{layer}"] = _at_rest(values, dtype)
        tensors[f"pos.{layer}"] = _at_rest(offsets, torch.int32)
    return tensors


def layers_of(tensors: Mapping[str, Tensor], attachment: Attachment) -> Layers:
    """Return the K-V of the memory layers: as they are stored, or as the frozen model makes them of soft tokens."""
    if "soft" in tensors:
        return expanded(tensors["soft"], attachment)
    layers = attachment.plan.memory_layers
    return {layer: (tensors[f"k.{layer}"], tensors[f"v.{layer}"], tensors[f"pos.{layer}"]) for layer in layers}


def _at_rest(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def slots_of(chunk: kvbank.Chunk, attachment: Attachment, icae: "Icae") -> "Slots":
    """Return what the frozen model reads of a chunk beside the rows of `icae`.

    A chunk that was not compressed is read whole. Errors: see `Memory.slots`.
    """
    _check(chunk, icae)
    return _soft_slots(chunk, icae) if icae.config.interface == "soft" else _pair_slots(chunk, attachment, icae)


def _is_whole(chunk: kvbank.Chunk) -> bool:
    """Tell whether a chunk was stored uncompressed."""
    producer = chunk.producer or kvbank.Producer("")
    return producer.method == "none" and not producer.adapter_digest


def _check(chunk: kvbank.Chunk, icae: "Icae") -> None:
    """Refuse a chunk that holds something else than the slots of `icae`, or its tokens whole."""
    producer = chunk.producer or kvbank.Producer("")
    if _is_whole(chunk):
        return
    if not producer.adapter_digest:
        raise InputError(f"chunk {chunk.chunk_id} holds no memory slots: it was stored by {producer.method!r}")
    if producer.adapter_digest != icae.digest:
        raise BankMismatch(
            f"chunk {chunk.chunk_id} was made by another ICAE adapter (digest {producer.adapter_digest}, this one is "
            f"{icae.digest})"
        )


def _soft_slots(chunk: kvbank.Chunk, icae: "Icae") -> "Slots":
    """Read a chunk for an adapter whose slots are soft tokens: as stored, or embedded from the chunk's own tokens."""
    from model_worker.icae.slots import Slots

    assert chunk.tensors is not None
    if _is_whole(chunk):
        if not chunk.token_ids:
            raise InputError(f"chunk {chunk.chunk_id} was not compressed, and its tokens are not stored")
        soft = icae.embed(chunk.token_ids)
    elif "soft" not in chunk.tensors:
        raise InputError(f"chunk {chunk.chunk_id} holds K-V of its slots, not the slots; write with payload=soft")
    else:
        soft = chunk.tensors["soft"].to(icae.device, icae.dtype)
    return Slots(soft, None, (chunk.original_length,), torch.arange(len(soft), device=icae.device))


def _pair_slots(chunk: kvbank.Chunk, attachment: Attachment, icae: "Icae") -> "Slots":
    """Read a chunk for an adapter whose slots are K-V, which the model needs of all its layers."""
    from model_worker.icae.slots import Slots

    assert chunk.tensors is not None
    if len(attachment.plan.memory_layers) < len(attachment.reports):
        raise InputError(
            f"chunk {chunk.chunk_id} holds K-V of layers {attachment.plan.memory_layers} alone; to read slots the "
            "model needs those of all its layers"
        )
    layers = layers_of(chunk.tensors, attachment)
    positions = next(iter(layers.values()))[2].to(icae.device).long()
    pairs = {
        layer: (keys.to(icae.device, icae.dtype), values.to(icae.device, icae.dtype))
        for layer, (keys, values, _) in layers.items()
    }
    return Slots(None, pairs, (chunk.original_length,), positions)
