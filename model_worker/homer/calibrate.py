"""A bias table is measured: the mean significance at each layer and distance over plain forwards of ordinary text.

The paper's table is the mean logit at a distance (HOMER, arXiv 2404.10308, section 3.2); how its files were made is not
published. Here: segments of text run as one leaf; for several end tokens of each, the largest logit over heads to every
earlier token counts towards its distance. The first tokens, which draw attention wherever they are, are left out. Rare
large distances are smoothed over their neighbours. Segments are added until the standard error is small against the
spread of the scores, or none are left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import Backend
from model_worker.attachment.model_parts import layer_of
from model_worker.attachment.view import ForwardView
from model_worker.errors import InputError
from model_worker.homer.node_view import logits
from model_worker.homer.tree import Trees, trees_of

_SINKS = 4
_SMOOTH = 9
_ENDS = 32  # end tokens of a segment


@dataclass(frozen=True, slots=True)
class Calibration:
    """A bias table and how well it is known.

    table: float32 `[layers, distances]`. segments: how many were read. error: the standard error of a table entry,
    as a share of the spread of significance at one distance; mean over layers and distances.
    """

    table: Tensor
    segments: int
    error: float


def calibrate(
    attachment: Attachment,
    ids: Sequence[int],
    *,
    distances: int | None = None,
    segments: int = 100,
    enough: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure a table of `distances` (half of the trained length) on at most `segments` pieces of `ids`.

    enough: stop when `Calibration.error` is below. progress: called with (segments done, segments at most). Raises
    InputError for a text shorter than one segment.
    """
    distances = distances or (attachment.trained_length or 4096) // 2
    size = distances + _SINKS
    pieces = [list(ids[at : at + size]) for at in range(0, len(ids) - size + 1, size)][:segments]
    if not pieces:
        raise InputError(f"{len(ids)} tokens of text are less than one segment of {size}")
    trees = trees_of(attachment)
    sums = _Sums(trees.layers, distances, trees.device)
    for done, piece in enumerate(pieces, start=1):
        _run(trees, piece, sums)
        error = sums.error()
        if progress is not None:
            progress(done, len(pieces))
        if done > 1 and error < enough:
            break
    return Calibration(sums.table().cpu(), done, error)


class _Sums:
    """The counts, sums and squares of significance, by layer and distance.

    Means of one segment are the samples of the standard error.
    """

    def __init__(self, layers: int, distances: int, device: torch.device):
        self.count, self.total, self.squares = torch.zeros(3, layers, distances, dtype=torch.float64, device=device)
        self.means, self.mean_squares = torch.zeros(2, layers, distances, dtype=torch.float64, device=device)
        self.segments = torch.zeros(layers, distances, device=device)

    def add(self, layer: int, significance: Tensor, distance: Tensor) -> None:
        """Add one segment's `significance` `[n]` at `distance` `[n]`."""
        width = self.count.shape[1]
        values = significance.double()
        count = torch.bincount(distance, minlength=width)[:width]
        total = torch.bincount(distance, weights=values, minlength=width)[:width]
        mean = total / count.clamp(min=1)
        self.count[layer] += count
        self.total[layer] += total
        self.squares[layer] += torch.bincount(distance, weights=values**2, minlength=width)[:width]
        self.means[layer] += mean
        self.mean_squares[layer] += mean**2
        self.segments[layer] += count > 0

    def error(self) -> float:
        """Return `Calibration.error` as it is now; 1 before the second segment."""
        if int(self.segments.max()) < 2:
            return 1.0
        n = self.segments.clamp(min=2)
        between = (self.mean_squares - self.means**2 / n).clamp(min=0) / (n - 1)
        spread = (self.squares - self.total**2 / self.count.clamp(min=1)) / self.count.clamp(min=1)
        return float((between / n).sqrt().mean() / spread.clamp(min=1e-12).sqrt().mean())

    def table(self) -> Tensor:
        """Return the means, smoothed over distances; distance 0 (the token itself, never dropped) is left as it is."""
        mean = (self.total / self.count.clamp(min=1))[:, 1:]
        half = min(_SMOOTH, 2 * mean.shape[1] - 1) // 2
        padded = nn.functional.pad(mean[None], (half, half), mode="replicate")[0]
        smooth = padded.unfold(1, 2 * half + 1, 1).mean(-1)
        own = self.total[:, :1] / self.count[:, :1].clamp(min=1)
        return torch.cat([own, smooth], dim=1).float()


class _Watch(ForwardView):
    """A plain forward, in which the significance of earlier tokens for some tokens of its second half is counted."""

    def __init__(self, attachment: Attachment, sums: _Sums):
        super().__init__()
        self.attachment, self.sums = attachment, sums

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
        layer, tokens = layer_of(module), key.shape[2]
        ends = torch.linspace(tokens // 2, tokens - 1, min(_ENDS, tokens - tokens // 2), device=key.device).long()
        found = logits(query[:, :, ends], key, self.attachment.reports[layer].scaling)[0].amax(0)[:, _SINKS:]
        distance = ends[:, None] - torch.arange(_SINKS, tokens, device=key.device)
        before = distance >= 0
        self.sums.add(layer, found[before], distance[before])
        return backend(module, query, key, value, mask, **kwargs)


def _run(trees: Trees, piece: list[int], sums: _Sums) -> None:
    """Count the significances of one segment."""
    with torch.no_grad():
        trees.decoder(
            input_ids=torch.tensor([piece], device=trees.device),
            use_cache=False,
            kvbank=_Watch(trees.attachment, sums),
        )
