"""What compression costs on real text: the loss of the text that follows a chunk, given what is left of the chunk.

From each document one chunk is taken; every method compresses it, every layer attends to the result at the tokens' own
positions, and the loss of the next tokens is measured. So `full` is the model's own loss with the whole chunk before
it, and `nothing` its loss without. The same documents serve every method, so differences are paired.

`leaves` is the baseline that HOMER's paper lacks: the chunk in independent pieces, each encoded and cut on its own by
TOVA's rule, nothing merged. `bias=measured` stands for a table that is calibrated here, on another text.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.compress import Compressor, compressor
from model_worker.errors import InputError
from model_worker.homer.bias import save_bias
from model_worker.homer.calibrate import calibrate
from model_worker.icae.expanded import expanded
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode
from model_worker.window.recalled import RecalledChunk

METHODS = (
    "window:m=N",
    "sinks:m=N",
    "h2o:m=N",
    "tova:m=N,block=1",
    "tova:m=N,block=16",
    "tova:m=N",
    "tova:m=N,observer=window:16",
    "tova:m=N,heads=own",
    "homer:m=N,leaf=64,bias=none",
    "homer:m=N,leaf=64,bias=measured",
    "homer:m=N,leaf=64,pool=9,bias=none",
    "leaves",
    "random:m=N",
)
_Z95 = 1.96
_Layers = dict[int, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one budget.

    loss: nats per token of the following text, mean over documents; low, high: its 95 % interval over documents.
    above: mean paired difference from `full`, with the half width of its interval. bytes_per_token: stored K-V per
    token of the chunk. seconds: time to compress a chunk beyond its plain forward, or of its own forward where the
    method runs the model itself; forward: that over the time of the plain forward.
    """

    method: str
    budget: int
    loss: float
    low: float
    high: float
    above: float
    above_width: float
    bytes_per_token: float
    seconds: float
    forward: float


def measure(
    model: nn.Module,
    tokenizer: object,
    documents: Sequence[Sequence[int]],
    *,
    chunk: int,
    follow: int,
    budgets: Sequence[int],
    methods: Sequence[str] = METHODS,
    calibration: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Rows for `nothing`, `full`, and every method at every budget. documents: `chunk + follow` ids each.

    methods: specs in which N stands for the budget. calibration: ids for `bias=measured`, of other text.
    progress: called with (documents done, documents in all).
    """
    if any(len(ids) != chunk + follow for ids in documents) or len(documents) < 2:
        raise InputError("two documents or more are needed, each of chunk + follow tokens")
    attachment = attach(model, tokenizer, mode="per_layer", positions="original")
    with ExitStack() as stack:
        stack.callback(attachment.detach)
        plans = list(_plans(methods, budgets, chunk))
        table = _table(stack, attachment, calibration, chunk) if calibrates(methods) else ""
        losses: list[list[float]] = [[] for _ in plans]
        seconds = [0.0 for _ in plans]
        sizes = [0.0 for _ in plans]
        plain = 0.0
        for done, ids in enumerate(documents, start=1):
            before, after = list(ids[:chunk]), list(ids[chunk:])
            began = time.perf_counter()
            captured = encode(attachment, before, needs_queries=True)
            plain += time.perf_counter() - began
            for index, (name, budget) in enumerate(plans):
                began = time.perf_counter()
                layers, soft = _compressed(attachment, captured, name, budget, table)
                seconds[index] += time.perf_counter() - began
                kept = [x for keys, values, _ in layers.values() for x in (keys, values)] if soft is None else [soft]
                sizes[index] += sum(x.numel() * x.element_size() for x in kept)
                if soft is not None:
                    layers = expanded(soft, attachment)
                losses[index].append(_loss(attachment, layers, chunk, after))
            if progress is not None:
                progress(done, len(documents))
    full = torch.tensor(losses[1], dtype=torch.float64)
    return [
        _row(name, budget, torch.tensor(own, dtype=torch.float64), full, size / chunk, spent, plain)
        for (name, budget), own, size, spent in zip(plans, losses, sizes, seconds, strict=True)
    ]


def cut(ids: Sequence[int], length: int, count: int) -> Iterator[list[int]]:
    """At most `count` pieces of `length` ids, spread evenly over a text."""
    count = min(count, len(ids) // length)
    for index in range(count):
        at = (len(ids) - length) * index // max(count - 1, 1)
        yield list(ids[at : at + length])


def calibrates(methods: Sequence[str]) -> bool:
    """Whether `measure` needs `calibration` for any of them."""
    return any("=measured" in name for name in methods)


def _table(stack: ExitStack, attachment: Attachment, ids: Sequence[int], chunk: int) -> str:
    """A calibrated table in a file that goes with `stack`; no distance in a tree is beyond its chunk."""
    folder = Path(stack.enter_context(TemporaryDirectory()))
    found = calibrate(attachment, ids, distances=min(chunk, (attachment.trained_length or 4096) // 2), segments=40)
    return str(save_bias(attachment, found.table, {}, folder / "table.safetensors"))


def _plans(methods: Sequence[str], budgets: Sequence[int], chunk: int) -> Iterator[tuple[str, int]]:
    yield "nothing", 0
    yield "full", chunk
    for budget in budgets:
        for name in methods:
            yield name, budget


def _compressed(
    attachment: Attachment, captured: Captured, name: str, budget: int, table: str
) -> tuple[_Layers, Tensor | None]:
    """K-V, or soft tokens. table: the file that `bias=measured` stands for."""
    if name == "nothing":
        return {}, None
    if name == "leaves":
        return _leaves(attachment, captured.token_ids, budget), None
    made = compressor("none" if name == "full" else name.replace("N", str(budget)).replace("=measured", f"={table}"))
    payload = made.compress(captured, attachment)
    return dict(payload.layers), payload.soft


def _leaves(attachment: Attachment, ids: list[int], budget: int, leaf: int = 64) -> _Layers:
    """Independent pieces, one behind the other; the first ones get what does not divide."""
    pieces = [ids[at : at + leaf] for at in range(0, len(ids), leaf)]
    found: list[_Layers] = []
    for index, piece in enumerate(pieces):
        own: Compressor | None = None
        if share := budget // len(pieces) + (index < budget % len(pieces)):
            own = compressor(f"tova:m={share}")
        if own is not None:
            layers = own.compress(encode(attachment, piece, needs_queries=True), attachment).layers
            found.append({i: (k, v, offsets + index * leaf) for i, (k, v, offsets) in layers.items()})
    return {
        i: (
            torch.cat([part[i][0] for part in found], dim=1),
            torch.cat([part[i][1] for part in found], dim=1),
            torch.cat([part[i][2] for part in found]),
        )
        for i in attachment.plan.memory_layers
    }


def _loss(attachment: Attachment, layers: _Layers, chunk: int, after: list[int]) -> float:
    """Mean loss of `after`, but for its first token."""
    cache = MemoryCache(attachment, start=chunk)
    if layers:
        cache.set_memory([[RecalledChunk(0, 0, layers)]])
    ids = torch.tensor([after], device=next(attachment.model.parameters()).device)
    with torch.no_grad():
        logits = attachment.model(input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True).logits
    return float(nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))


def _row(name: str, budget: int, losses: Tensor, full: Tensor, size: float, spent: float, plain: float) -> Row:
    documents = len(losses)
    above = losses - full
    width, above_width = (_Z95 * float(x.std()) / math.sqrt(documents) for x in (losses, above))
    mean = float(losses.mean())
    return Row(
        name.replace("N", str(budget)) if name != "leaves" else f"leaves of 64, {budget} tokens",
        budget,
        mean,
        mean - width,
        mean + width,
        float(above.mean()),
        above_width,
        size / documents,
        spent / documents,
        spent / plain,
    )
