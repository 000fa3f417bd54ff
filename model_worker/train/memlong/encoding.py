"""Chunks are encoded alone here, many in one forward, which ends with the last memory layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import Backend
from model_worker.attachment.model_parts import layer_of
from model_worker.attachment.raw_keys import raw_keys
from model_worker.attachment.view import ForwardView
from model_worker.train.memlong.forward import KeyValue, OneForward


class _Encoded(Exception):
    """Nothing above the last memory layer is wanted of a forward."""


class KeepingView(ForwardView):
    """A forward whose memory layers keep their keys before RoPE and their values, by layer, each `[B, Hkv, T, D]`."""

    def __init__(self, attachment: Attachment):
        super().__init__()
        self.attachment = attachment
        self.kept: dict[int, KeyValue] = {}

    def observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]) -> None:
        layer = layer_of(module)
        if layer not in self.attachment.plan.memory_layers:
            return
        report, rope = self.attachment.reports[layer], self.attachment.ropes[layer]
        projected = None if report.layout is None else self.projections.pop(layer)
        self.kept[layer] = raw_keys(report, rope, key, projected, self.rotations.get(layer)), value


class _EncodingView(KeepingView):
    """A forward that ends where the last memory layer has its keys and values."""

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
        attended = None
        if layer_of(module) != self.attachment.plan.memory_layers[-1]:
            attended = super().attend(backend, module, query, key, value, mask, **kwargs)
        else:
            self.observe(module, query, key, value, kwargs)
        if attended is None:
            raise _Encoded
        return attended


def encode_alone(attachment: Attachment, chunks: Tensor) -> dict[int, KeyValue]:
    """Return the K-V of each memory layer, `[N, Hkv, S, D]`, of chunks `[N, S]` of token ids that are encoded alone.

    Gradients flow where torch records them.
    """
    view = _EncodingView(attachment)
    positions = torch.arange(chunks.shape[1], device=chunks.device)[None]
    try:
        attachment.decoder(input_ids=chunks, past_key_values=OneForward(attachment, view, positions))
    except _Encoded:
        return view.kept
    raise AssertionError("no memory layer has run")
