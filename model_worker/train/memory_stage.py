"""The forward of a Llama with memory: chosen layers read the keys and values of one layer, of chunks encoded alone.

The forward is written out layer by layer, as training needs gradients through the kept keys and values and runs the
chunks through the lower layers only. The attention is that of the worker (`model_worker.attachment.attention`), so both
compute the same.

Shapes: B rows, L local tokens, C chunks a row of S tokens each, M = C * S memory tokens, Hkv grouped heads of size D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model_worker.attachment.attention import RetrievedKV, retrieval_causal_attention

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class MemoryLayout:
    """The layer whose keys and values are kept, and the layers that attend to them."""

    memory_layer: int
    retrieval_layers: tuple[int, ...]


def encode_chunks(model: LlamaForCausalLM, chunks: Tensor, layer: int) -> KeyValue:
    """Return keys before rotation and values of `layer`, each `[B, Hkv, C * S, D]`, of chunks `[B, C, S]`.

    Each chunk is encoded alone, at positions from 0.
    """
    batch, count, size = chunks.shape
    hidden = model.model.embed_tokens(chunks.view(batch * count, size))
    rotation = model.model.rotary_emb(hidden, torch.arange(size)[None])
    for block in model.model.layers[:layer]:
        hidden = _block(block, hidden, rotation, None)
    block = model.model.layers[layer]
    normed = _norm(block.input_layernorm, hidden)
    head = block.self_attn.head_dim

    def flat(x: Tensor) -> Tensor:
        return x.view(batch, count * size, -1, head).transpose(1, 2)

    return flat(block.self_attn.k_proj(normed)), flat(block.self_attn.v_proj(normed))


def hidden_states(
    model: LlamaForCausalLM, local: Tensor, memory: KeyValue | None = None, layers: tuple[int, ...] = ()
) -> Tensor:
    """Return the final hidden states `[B, L, hidden]` of local tokens `[B, L]` that attend to memory in `layers`.

    Local tokens have positions from 1; all memory keys stand at 0, where rotation changes nothing.
    """
    hidden = model.model.embed_tokens(local)
    rotation = model.model.rotary_emb(hidden, torch.arange(1, local.shape[1] + 1)[None])
    for index, block in enumerate(model.model.layers):
        hidden = _block(block, hidden, rotation, memory if index in layers else None)
    return _norm(model.model.norm, hidden)


def _block(block: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor], memory: KeyValue | None) -> Tensor:
    hidden = hidden + _attention(block.self_attn, _norm(block.input_layernorm, hidden), rotation, memory)
    further: Tensor = block.mlp(_norm(block.post_attention_layernorm, hidden))
    return hidden + further


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)


def _attention(attn: Any, x: Tensor, rotation: tuple[Tensor, Tensor], memory: KeyValue | None) -> Tensor:
    """Attend with one softmax over memory, seen by every query, and local tokens, seen causally: `[B, L, hidden]`."""
    batch, length, _ = x.shape
    query, key, value = (
        projection(x).view(batch, length, -1, attn.head_dim).transpose(1, 2)
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotation)
    retrieved = None if memory is None else RetrievedKV(*memory)
    out, _ = retrieval_causal_attention(
        sdpa_attention_forward, attn, query, key, value, None, retrieved, scaling=attn.scaling
    )
    projected: Tensor = attn.o_proj(out.reshape(batch, length, -1))
    return projected
