"""The layers of a model that can use a memory are found by measurement here, without training.

A span of random tokens is encoded apart, its K-V are given to one layer at a time, and the loss of the same span, read
again, is compared with the loss without memory. Induction layers stand out; MemLong's memory layer should be one, and
should itself retrieve.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.reports import LayerReport
from model_worker.window.cache import MemoryCache
from model_worker.window.encoding import encode
from model_worker.window.recalled import RecalledChunk

_CUE = 8


@dataclass(frozen=True, slots=True)
class LayerScore:
    """How much memory in this layer alone helps: loss of a repeated span in nats per token, lower is better.

    drop = loss without memory - loss with this layer's own K-V, at `continual` and at `zero` positions. `layer` None
    stands for all layers together. kind and capture are the probe's.
    """

    layer: int | None
    kind: str
    capture: str
    drop_continual: float
    drop_zero: float


@dataclass(frozen=True, slots=True)
class LayersReport:
    """The loss of the spans without memory, in nats per token, and a score of each layer, then of all together."""

    loss_without_memory: float
    layers: list[LayerScore]

    @property
    def best(self) -> LayerScore:
        """Return the score of the single layer that memory at zero positions helps most."""
        return max((score for score in self.layers if score.layer is not None), key=lambda score: score.drop_zero)


def measure_layers(
    model: Any, *, span: int = 48, trials: int = 8, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> LayersReport:
    """Measure every layer that can be attached, and then all of them together, over `trials` spans of `span` tokens.

    progress: called with (layers done, layers in all). The model is left as it was. Raises UnsupportedModel where no
    layer can be attached.
    """
    spans = _random_spans(model, span, trials, seed)
    drops: dict[str, dict[int | None, float]] = {}
    baseline = 0.0
    reports: list[LayerReport] = []
    for done, positions in enumerate(("continual", "zero")):
        attachment = attach(model, mode="per_layer", positions=positions)
        try:
            reports = attachment.reports
            recalled = [_recalled(attachment, row) for row in spans.tolist()]
            baseline = _loss(attachment, spans, None, recalled)
            drops[positions] = {}
            targets = [*attachment.plan.memory_layers, None]
            for index, layer in enumerate(targets):
                chosen = attachment.plan.memory_layers if layer is None else (layer,)
                drops[positions][layer] = baseline - _loss(attachment, spans, chosen, recalled)
                if progress is not None:
                    progress(done * len(targets) + index + 1, 2 * len(targets))
        finally:
            attachment.detach()
    return LayersReport(baseline, list(_scores(reports, drops)))


def _scores(reports: list[LayerReport], drops: dict[str, dict[int | None, float]]) -> Iterator[LayerScore]:
    for layer, drop in drops["continual"].items():
        kind, capture = ("all", "") if layer is None else (reports[layer].kind, reports[layer].capture)
        yield LayerScore(layer, kind, capture, drop, drops["zero"][layer])


def _random_spans(model: nn.Module, span: int, trials: int, seed: int) -> Tensor:
    """Draw token ids `[trials, span]`, each row without repeats, so that only the memory can tell what comes next."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    rows = [torch.randperm(vocabulary, generator=generator)[:span] for _ in range(trials)]
    return torch.stack(rows).to(next(model.parameters()).device)


def _recalled(attachment: Attachment, ids: list[int]) -> RecalledChunk:
    captured = encode(attachment, ids)
    offsets = torch.arange(len(ids))
    return RecalledChunk(0, 0, {layer: (c.keys, c.values, offsets) for layer, c in captured.layers.items()})


def _loss(
    attachment: Attachment, spans: Tensor, layers: tuple[int, ...] | None, recalled: list[RecalledChunk]
) -> float:
    """Return the mean loss of the spans behind their first tokens, with the memory in `layers` only."""
    cache = MemoryCache(attachment)
    if layers is not None:
        only = [RecalledChunk(c.chunk_id, c.start, {x: c.layers[x] for x in layers}) for c in recalled]
        cache.set_memory([[chunk] for chunk in only])
    with torch.no_grad():
        logits = attachment.model(input_ids=spans, past_key_values=cache, use_cache=True, return_dict=True).logits
    predicted, target = logits[:, _CUE:-1].flatten(0, 1).float(), spans[:, _CUE + 1 :].flatten()
    return float(nn.functional.cross_entropy(predicted, target))
