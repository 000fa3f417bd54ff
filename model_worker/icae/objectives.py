"""The objectives of training: restoration (AE), continuation (LM) and instruction (FT), as sums of nats.

They are sums over scored tokens, not means: with rows of different lengths, and with gradient accumulation, only sum /
tokens over the whole step gives each token the same weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.icae.data import Sample
from model_worker.icae.decode import losses
from model_worker.icae.layout import UNSCORED, Row, answer_row, continue_row, restore_row
from model_worker.icae.model import Icae
from model_worker.icae.slots import Slots


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Make a batch for `Objectives`: the samples, and `labels` `[B, t]`, their scored tokens filled up with -100.

    The labels are there for the Trainer, which counts the scored tokens of a whole step in them.
    """
    longest = max(len(sample.scored) for sample in samples)
    labels = torch.full((len(samples), longest), UNSCORED)
    for row, sample in zip(labels, samples, strict=True):
        row[: len(sample.scored)] = torch.tensor(sample.scored)
    return {"samples": list(samples), "labels": labels}


def decoder_row(icae: Icae, sample: Sample, slots: Slots | None) -> Row:
    """Lay out the decoder's sequence for a sample; without slots, what the plain model reads in its place."""
    if sample.objective == "ft" and slots is not None:
        return answer_row(icae, slots, sample.prompt, sample.target, ends=False)
    if sample.objective == "lm":
        return continue_row(icae, slots, sample.target, leave=sample.leave)
    return restore_row(icae, slots, sample.target, ends=False)


def needed(icae: Icae, sample: Sample) -> int:
    """Return the positions that the loss of a sample takes; its last token is predicted, and never read."""
    config = icae.config
    row = sample.objective != "lm" or config.lm_row
    around = len(config.prefix_ids) + len(sample.prompt) + len(config.suffix_ids) if sample.objective == "ft" else 0
    return config.before(len(sample.context)) + row + around + len(sample.target) - 1


@dataclass
class Tally:
    """The nats and tokens of each objective, added up over batches."""

    nats: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, samples: Sequence[Sample], nats: Tensor, tokens: Tensor) -> None:
        """Add the nats and scored tokens of a batch, `[B]` both."""
        for sample, own, count in zip(samples, nats.tolist(), tokens.tolist(), strict=True):
            self.nats[sample.objective] += own
            self.tokens[sample.objective] += int(count)

    def means(self) -> dict[str, float]:
        """Return `loss` over all tokens, and `ae_loss`, `lm_loss`, `ft_loss` over their own; empty without tokens."""
        total = sum(self.tokens.values())
        found = {"loss": sum(self.nats.values()) / total} if total else {}
        return found | {f"{name}_loss": self.nats[name] / count for name, count in self.tokens.items() if count}


class Objectives(nn.Module):
    """An adapter as the Trainer wants a model: samples in, loss out. Saves and loads through the adapter alone."""

    accepts_loss_kwargs = True  # the Trainer gives the scored tokens of the whole step

    def __init__(self, icae: Icae):
        super().__init__()
        self.icae = icae

    def forward(
        self, samples: Sequence[Sample], labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Mapping[str, Tensor]:
        """Return `loss`, a scalar: nats of the batch over the tokens of the step (of the batch, if not given).

        `nats` and `tokens`, `[B]` each, are those of each sample. labels: only for the Trainer, see `collate`.
        """
        slots = self.icae.encode([sample.context for sample in samples])
        rows = [decoder_row(self.icae, sample, own) for sample, own in zip(samples, slots, strict=True)]
        nats, tokens = losses(self.icae, rows)
        return {"loss": nats.sum() / (tokens.sum() if num_items_in_batch is None else num_items_in_batch)} | {
            "nats": nats.detach(),
            "tokens": tokens,
        }

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **more: object
    ) -> None:
        """Recompute layers in the backward pass, all of them, whatever `more` says; the Trainer calls this."""
        self.icae.gradient_checkpointing_enable(activation_checkpointing_kwargs)
