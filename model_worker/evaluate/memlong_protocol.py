"""MemLong's own evaluation of perplexity, beside which its published figures can be read; it is no measure of memory.

Source: the evaluation of language modelling in the public repository of MemLong (arXiv 2408.16967), commit 598fdf8.
A text is cut into windows without overlap. Of each window all but the last segment is read into the memory, chunk by
chunk; the last segment is one forward, and it alone is scored. Two things make the figure look better than a memory of
the past would: the query of the last segment is the segment itself, so that the answer chooses its memory; and models
without a memory are scored on all tokens of the window, of which the first have little context. Here the same segments
are also scored without a memory, which is the honest comparison within this protocol.

As in the program the memory is kept from window to window and from text to text. Deviation: the first token of a
segment is not scored, since nothing before it is in the segment's context.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_worker.evaluate.banks import open_memory
from model_worker.evaluate.interval import interval_of_few
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.window.cache import MemoryCache

LAST = 2048  # tokens of the last segment in the published script
BANK = "memlong"


@dataclass(frozen=True, slots=True)
class Windows:
    """The mean losses in nats of N windows of a protocol, `[N]` each.

    segment: of the last segments with a memory. alone: of the same tokens without. whole: of all tokens of the windows,
    plain, as models without a memory are scored; empty where a window is longer than the model was trained for.
    """

    segment: Tensor
    alone: Tensor
    whole: Tensor

    def document(self) -> list[dict[str, Any]]:
        """Return a row for each way of scoring."""
        rows = [_row("last segments, memory chosen by themselves", self.segment)]
        rows.append(_row("the same tokens without a memory", self.alone))
        if len(self.whole):
            rows.append(_row("all tokens of the windows, plain model", self.whole))
        gain = interval_of_few(self.alone - self.segment)
        rows[0] |= {"gain": gain.mean, "width": gain.known_width}
        return rows


def _row(way: str, nats: Tensor) -> dict[str, Any]:
    return {"scored": way, "windows": len(nats), "nats": float(nats.mean()), "perplexity": float(nats.mean().exp())}


def segment_of(model: MemoryModel) -> int:
    """Return the tokens of a last segment: as published, or half of the trained length where that is less."""
    trained = model.attachment.trained_length
    return LAST if trained is None else min(LAST, trained // 2)


def window_of_protocol(model: MemoryModel) -> int:
    """Return the tokens of a window: two segments."""
    return 2 * segment_of(model)


def protocol_memory(model: MemoryModel) -> Memory:
    """Return the memory of the protocol, whose queries are what is processed, up to a whole segment."""
    return open_memory(model, BANK, query="with_input", query_tokens=segment_of(model), context="isolated", count=False)


@torch.no_grad()
def score_windows(
    model: MemoryModel,
    memory: Memory,
    ids: Sequence[int],
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, float, float | None]]:
    """Return the mean losses of at most `count` windows at the beginning of a text: segment, alone and whole.

    A window has two segments. progress: called with (windows done, in all).
    """
    last = segment_of(model)
    length, trained = window_of_protocol(model), model.attachment.trained_length
    found = []
    count = min(count, len(ids) // length)
    for index in range(count):
        window = list(ids[index * length : (index + 1) * length])
        model.read(window[:last], memory=memory)
        cache = MemoryCache(model.attachment, memory, window=last, sinks=0)
        segment = _loss(model, window[last:], cache)
        cache.flush()
        alone = _loss(model, window[last:], None)
        whole = None if trained is not None and length > trained else _loss(model, window, None)
        found.append((segment, alone, whole))
        if progress is not None:
            progress(index + 1, count)
    return found


def windows(found: Sequence[tuple[float, float, float | None]]) -> Windows:
    """Return what windows of all texts were scored with, as tensors."""
    segment, alone = (torch.tensor([own[part] for own in found], dtype=torch.float64) for part in (0, 1))
    return Windows(segment, alone, torch.tensor([own for *_, own in found if own is not None], dtype=torch.float64))


def _loss(model: MemoryModel, ids: list[int], cache: MemoryCache | None) -> float:
    """Return the mean loss of all tokens but the first in one forward."""
    seen = torch.tensor([ids], device=model.model.device)
    out = model.model(input_ids=seen, past_key_values=cache, use_cache=cache is not None, return_dict=True)
    return float(torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), seen[0, 1:]))
