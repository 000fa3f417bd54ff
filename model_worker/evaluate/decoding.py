"""What a bounded cache costs while decoding is measured here: loss, tokens a second and bytes, by rule and share.

A prompt is read in blocks (of at most an eighth of a window, where one bounds the cache), and the tokens behind it are
fed one by one, whatever the model would have written. So all caches see the same tokens, and their losses are paired.
The rules:

* `full`: transformers' DynamicCache, which keeps everything (and copies it all for each new token).
* `tova`: the tokens that the last one attends to most (arXiv 2401.06104), a share of the full cache in each layer.
* `sinks`: the first 4 tokens and the last ones (StreamingLLM, arXiv 2309.17453), as many together.
* `window`: the last tokens alone, as many.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.model_parts import device_of
from model_worker.errors import InputError
from model_worker.evaluate.interval import interval
from model_worker.evaluate.journal import Journal
from model_worker.window.cache import MemoryCache
from model_worker.window.tova import TovaRule

FULL, TOVA, SINKS, WINDOW = "full", "tova", "sinks", "window"
BOUNDED = (TOVA, SINKS, WINDOW)
_BLOCK, _SINKS = 64, 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured of each document.

    tokens: of its prompt. new: tokens that are decoded behind it. shares: a bounded cache keeps the prompt's tokens
    divided by one of these. rules: of bounded caches. Raises InputError for a rule that is not there, and a share that
    leaves fewer than 8 tokens.
    """

    tokens: int
    new: int
    shares: Sequence[int]
    rules: Sequence[str] = BOUNDED

    def __post_init__(self) -> None:
        if unknown := [rule for rule in self.rules if rule not in BOUNDED]:
            raise InputError(f"there is no rule {unknown[0]!r}; there are {', '.join(BOUNDED)}")
        if self.tokens // max(self.shares) < 2 * _SINKS:
            raise InputError(f"1/{max(self.shares)} of {self.tokens} tokens is less than {2 * _SINKS} tokens")


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one rule with so many tokens kept.

    nats: loss per decoded token, mean over documents; low, high: ends of its 95 % interval. above: mean paired
    difference from `full`; above_width: half the width of its interval. rate: decoded tokens a second. bytes: of the
    cache behind the last token, mean.
    """

    rule: str
    kept: int
    nats: float
    low: float
    high: float
    above: float
    above_width: float
    rate: float
    bytes: float


def measure_decoding(
    model: nn.Module,
    tokenizer: object,
    documents: Sequence[Sequence[int]],
    plan: Plan,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Row]:
    """Return rows of `full` and of every rule at every share. documents: `tokens + new` ids each.

    journal: figures of an earlier run. progress: called with (figures done, figures in all). Raises InputError for
    fewer than two documents, and for more tokens than the model was trained for.
    """
    if len(documents) < 2:
        raise InputError(f"the texts are too short for two documents of {plan.tokens + plan.new} tokens")
    journal = journal or Journal(None, {})
    attachment = attach(model, tokenizer, mode="per_layer")
    try:
        trained = attachment.trained_length
        if trained is not None and plan.tokens + plan.new > trained:
            raise InputError(f"{plan.tokens + plan.new} tokens are more than the {trained} that the model can read")
        bounded = [(rule, plan.tokens // share) for share in plan.shares for rule in plan.rules]
        # Shares that keep as many tokens are one.
        parts: dict[tuple[str, int], list[Mapping[str, float]]] = {own: [] for own in [(FULL, plan.tokens), *bounded]}
        done = 0
        for number, ids in enumerate(documents, start=1):
            for (rule, kept), own in parts.items():
                progress(done, len(documents) * len(parts))
                done += 1
                key = f"document {number}, {rule}, {kept} tokens"
                part = journal.get(key)
                if part is None:
                    part = _measured(attachment, _cache(attachment, rule, kept), ids, plan.tokens)
                    journal.put(key, part)
                own.append(part)
        progress(done, done)
    finally:
        attachment.detach()
    return list(_rows(parts, plan.new))


def _cache(attachment: Attachment, rule: str, kept: int) -> DynamicCache | MemoryCache:
    """Return a fresh cache of a rule that keeps `kept` tokens."""
    if rule == FULL:
        return DynamicCache()
    if rule == TOVA:
        return MemoryCache(attachment, local=TovaRule(kept))
    sinks = _SINKS if rule == SINKS else 0
    return MemoryCache(attachment, window=kept - sinks, sinks=sinks)


@torch.no_grad()
def _measured(
    attachment: Attachment, cache: DynamicCache | MemoryCache, ids: Sequence[int], prompt: int
) -> dict[str, float]:
    """Read a prompt and decode what follows; return the mean loss, the seconds of decoding, and the cache's bytes."""
    model: Any = attachment.model
    seen = torch.tensor([list(ids)], device=device_of(model))
    room = cache.window if isinstance(cache, MemoryCache) else None
    # A window makes room for a block before it is read: so a block is small, and sees most of what the window keeps.
    block = _BLOCK if room is None else min(_BLOCK, -(-room // 8))

    def fed(begin: int, end: int) -> Tensor:
        out = model(
            input_ids=seen[:, begin:end], past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    for begin in range(0, prompt, block):
        logits = fed(begin, min(begin + block, prompt))
    # Numbers, not tensors: as in generation, a token is there before the next one is decoded, on a GPU too.
    nats = [float(nn.functional.cross_entropy(logits.float(), seen[:, prompt]))]
    began = time.perf_counter()
    for place in range(prompt, seen.shape[1] - 1):
        logits = fed(place, place + 1)
        nats.append(float(nn.functional.cross_entropy(logits.float(), seen[:, place + 1])))
    seconds = time.perf_counter() - began
    return {"nats": fmean(nats), "seconds": seconds, "bytes": _bytes(cache)}


def _bytes(cache: DynamicCache | MemoryCache) -> int:
    """Return the bytes of keys, values and whatever else a cache holds of them."""
    if isinstance(cache, MemoryCache):
        tensors = [tensor for tensor in cache.state().values() if tensor.is_floating_point()]
    else:
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _rows(parts: Mapping[tuple[str, int], Sequence[Mapping[str, float]]], new: int) -> Iterator[Row]:
    """Yield a row of each cache. parts: what was measured of each document; `full` comes first."""
    whole: Tensor | None = None
    for (rule, kept), own in parts.items():
        nats = torch.tensor([part["nats"] for part in own], dtype=torch.float64)
        whole = nats if whole is None else whole
        loss, above = interval(nats), interval(nats - whole)
        rate = (new - 1) * len(own) / max(1e-9, sum(part["seconds"] for part in own))
        size = sum(part["bytes"] for part in own) / len(own)
        yield Row(rule, kept, loss.mean, loss.low, loss.high, above.mean, above.width, rate, size)
