"""The module that is trained: a model with a memory, and the gates of its layers. Its output is the loss of a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.model_parts import config_of, device_of
from model_worker.train.memlong.block_memory import BlockMemory
from model_worker.train.memlong.blockwise import BlockwiseView, Places, blockwise_logits
from model_worker.train.memlong.encoding import encode_alone
from model_worker.train.memlong.forward import KeyValue
from model_worker.train.memlong.remembering import Chosen
from model_worker.train.memlong.rows import Blocks, Rows
from model_worker.train.memlong.streams import UNSCORED


@dataclass(frozen=True, slots=True)
class Step:
    """Rows and what their blocks attend to (None: nothing). pool: K-V of stored chunks by memory layer.

    chunks: the chunks `[n, S]` that are encoded alone; None where the rows' own forward makes their K-V. weight: of the
    step's loss.
    """

    rows: Rows
    chosen: Chosen | None
    pool: Mapping[int, KeyValue]
    chunks: Tensor | None = None
    weight: float = 1.0


class Learner(nn.Module):
    """The model of `attachment` in training. gated: make gates for its retrieval layers, which begin at 1/2.

    gradients: let gradients through K-V of the present step.
    """

    def __init__(
        self,
        attachment: Attachment,
        blocks: Blocks,
        *,
        gated: bool = False,
        gradients: bool = False,
    ):
        super().__init__()
        self.model = attachment.model
        self.gates = nn.ParameterDict()
        self.attachment = attachment
        self._blocks, self._gradients = blocks, gradients
        config: Any = config_of(attachment.model)
        for layer in attachment.plan.retrieval_layers if gated else ():
            self.gates[str(layer)] = nn.Parameter(torch.zeros(config.num_attention_heads, device=device_of(self.model)))

    def gate_values(self) -> dict[int, Tensor]:
        """Return the gates by layer, `[Hq]` in (0, 1): those in training, else the attachment's."""
        return {int(layer): gate.sigmoid() for layer, gate in self.gates.items()} or self.attachment.gates

    def forward(self, step: Step) -> tuple[Tensor, dict[int, KeyValue]]:
        """Return the loss of a step, the mean over its scored tokens times its weight, and the K-V of its chunks."""
        nats, kv = self.nats(step)
        scored = step.rows.labels != UNSCORED
        return step.weight * nats.sum() / scored.sum().clamp(min=1), kv

    def nats(self, step: Step) -> tuple[Tensor, dict[int, KeyValue]]:
        """Return the loss of each token `[B, T]`, 0 where none is asked for, and the K-V of the step's chunks by memory
        layer, `[n, Hkv, S, D]`.
        """
        fresh = None if step.chunks is None else self.encode(step.chunks)
        memory = self._memory(step, fresh)
        places = Places(self._blocks, step.rows, self.attachment.plan.positions)
        view = BlockwiseView(self.attachment, places, memory, self.gate_values())
        logits = blockwise_logits(self.model, view, step.rows)
        labels = step.rows.labels
        nats = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=UNSCORED, reduction="none"
        )
        if fresh is None:
            fresh = {layer: view.chunks(layer) for layer in self.attachment.plan.memory_layers}
        return nats.view(labels.shape), fresh

    def encode(self, chunks: Tensor) -> dict[int, KeyValue]:
        """Return the K-V of chunks `[n, S]` that are encoded alone, by memory layer."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._gradients):
            return encode_alone(self.attachment, chunks)

    def _memory(self, step: Step, fresh: Mapping[int, KeyValue] | None) -> BlockMemory | None:
        """Return what the blocks attend to; None where no block attends to anything."""
        if step.chosen is None or not bool((step.chosen.places >= 0).any()):
            return None
        chosen = step.chosen
        pooled = chosen.pooled, step.pool
        return BlockMemory(chosen.places, chosen.offsets, chosen.own, *pooled, fresh, self._gradients)
