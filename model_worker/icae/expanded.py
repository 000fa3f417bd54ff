"""Soft tokens as the K-V that the frozen model makes of them: what a chunk's slots are where attention recalls them."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.digest import state_token
from model_worker.attachment.model_parts import evaluating
from model_worker.errors import InputError
from model_worker.icae.capture import KVView
from model_worker.icae.model import Icae
from model_worker.icae.twin import shared_parameters, twin, without_memory
from model_worker.window.capture import Layers

# Of bare models: their state when a twin of them was attached, and the twin's attachment. A twin refers to the weights
# and not to the model, so that the entry goes with the model.
TWINS: "WeakKeyDictionary[nn.Module, tuple[int, Attachment]]" = WeakKeyDictionary()


@torch.no_grad()
def to_kv(
    source: Icae | Attachment | nn.Module, soft: Tensor, layers: Sequence[int] | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the K-V of `soft` `[n, d]` by layer (all by default), from one forward of the plain decoder over it alone.

    Keys `[Hkv, n, D]` before RoPE, values alike, in the model's dtype. source: the adapter, or, where only its slots
    are, an attachment of the base or the base itself. Exact for slots that stand first. Chunks expanded one by one have
    not seen each other: in deeper layers that is an approximation of one forward over all their slots. Raises
    InputError for a layer that does not exist, and for more slots than the model has positions.
    """
    reader = _reader_of(source)
    chosen = range(len(reader.reports)) if layers is None else layers
    if wrong := [layer for layer in chosen if not 0 <= layer < len(reader.reports)]:
        raise InputError(f"layer {wrong[0]} does not exist; the model has {len(reader.reports)}, counted from 0")
    if reader.trained_length and len(soft) > reader.trained_length:
        raise InputError(f"{len(soft)} slots stand on more than the {reader.trained_length} positions of this model")
    like = next(reader.model.parameters())
    positions = torch.arange(len(soft), device=like.device)[None]
    view = KVView()
    with evaluating(reader.decoder):
        reader.decoder(
            inputs_embeds=soft[None].to(device=like.device, dtype=like.dtype),
            attention_mask=torch.ones_like(positions),
            position_ids=positions,
            use_cache=False,
            kvbank=view,
        )
    return {layer: (k[0], v[0]) for layer, (k, v) in view.taken(reader, chosen, positions, len(soft)).items()}


def expanded(soft: Tensor, attachment: Attachment) -> Layers:
    """Return the K-V of the memory layers from one forward of the frozen model over a chunk's soft tokens, `[n, d]`.

    The soft tokens stand at the first places of the chunk. Several chunks so expanded are an approximation: each is
    alone in its forward, so that in deeper layers none has seen those before it, as it would have if the model read one
    behind the other (`Memory.slots` is for that).
    """
    offsets = torch.arange(len(soft), dtype=torch.int32)
    return {layer: (*pair, offsets) for layer, pair in to_kv(attachment, soft, attachment.plan.memory_layers).items()}


def _reader_of(source: Icae | Attachment | nn.Module) -> Attachment:
    """Return the attachment whose decoder reads slots; of a bare model that of a twin, which is attached once.

    The model itself is left as it is. A twin shares its weights, and is made anew where these were replaced or written.
    """
    if isinstance(source, Icae):
        return source.reader
    if isinstance(source, Attachment):
        return source
    state = state_token(source)
    known = TWINS.get(source)
    if known is None or known[0] != state:
        alike = without_memory(twin(source, shared_parameters(source)))
        known = TWINS[source] = state, attach(alike, mode="per_layer", positions="continual")
    return known[1]
