"""What compression costs on real text is measured here: the loss of the text that follows a compressed chunk.

From each document one chunk is taken; every method compresses it, every layer attends to the result at the tokens' own
positions, and the loss of the next tokens is measured. So `full` is the model's own loss with the whole chunk before
it, and `nothing` its loss without. The same documents serve every method, so differences are paired.

Each figure is noted in a journal as it comes, since a real model may take minutes a document.

`leaves` is the baseline that HOMER's paper lacks: the chunk in independent pieces, each encoded and cut on its own by
TOVA's rule, nothing merged. `bias=measured` stands for a table that is calibrated here, on another text.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.compress import Compressor, compressor
from model_worker.compress.press import Press
from model_worker.errors import InputError
from model_worker.evaluate.interval import interval
from model_worker.evaluate.journal import Journal
from model_worker.homer.bias import save_bias
from model_worker.homer.calibrate import calibrate
from model_worker.icae.expanded import expanded
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode
from model_worker.window.recalled import RecalledChunk

# The paper's rule of TOVA, `tova:m=N,block=1`, is none of these: it runs the model once for each token.
METHODS = (
    "window:m=N",
    "sinks:m=N",
    "h2o:m=N",
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
_LEAF = 64  # tokens of one of the independent pieces
_Layers = dict[int, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured of every document.

    chunk: tokens that are compressed. follow: tokens behind the chunk whose loss is measured. budgets: tokens that are
    kept. methods: specs of compressors in which N stands for the budget. Raises InputError for a spec that is none,
    and for one whose package is not installed.
    """

    chunk: int
    follow: int
    budgets: Sequence[int]
    methods: Sequence[str] = METHODS

    def __post_init__(self) -> None:
        for budget in self.budgets:
            for name in set(self.methods) - {"leaves"}:
                made = compressor(with_budget(name, budget).replace("=measured", "=none"))
                if isinstance(made, Press):
                    made.check_installed()


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one method at one budget.

    loss: nats per token of the following text, mean over documents; low, high: ends of its 95 % interval over
    documents. above: mean paired difference from `full`; above_width: half the width of its interval. bytes_per_token:
    stored K-V per token of the chunk. seconds: time to compress a chunk beyond its plain forward, or of its own forward
    where the method runs the model itself. forward: `seconds` over the time of the plain forward.
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


@dataclass(slots=True)
class _Contender:
    """One method at one budget, and what was measured of it so far: a loss of each document, bytes and seconds."""

    method: str
    budget: int
    losses: list[float] = field(default_factory=list)
    size: float = 0.0
    seconds: float = 0.0

    def row(self, full: "_Contender", chunk: int, plain: float) -> Row:
        """Return the figures of the contender.

        full: the contender that keeps the whole chunk. plain: seconds of all plain forwards.
        """
        losses, whole = (torch.tensor(own.losses, dtype=torch.float64) for own in (self, full))
        loss, above = interval(losses), interval(losses - whole)
        return Row(
            self.name,
            self.budget,
            loss.mean,
            loss.low,
            loss.high,
            above.mean,
            above.width,
            self.size / chunk / len(losses),
            self.seconds / len(losses),
            self.seconds / plain,
        )

    @property
    def name(self) -> str:
        """Return the method with its budget."""
        named = with_budget(self.method, self.budget)
        return f"leaves of {_LEAF}, {self.budget} tokens" if self.method == "leaves" else named

    def add(self, part: Mapping[str, Any]) -> None:
        """Add what was measured of one document."""
        self.losses.append(part["loss"])
        self.size += part["bytes"]
        self.seconds += part["seconds"]


def with_budget(method: str, budget: int) -> str:
    """Return the spec of a compressor in which the budget stands in the place of N: `tova:m=32` for `tova:m=N`."""
    return re.sub(r"(?<=[=:])N\b", str(budget), method)


def measure(
    model: nn.Module,
    tokenizer: object,
    documents: Sequence[Sequence[int]],
    plan: Plan,
    *,
    calibration: Sequence[int] = (),
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Row]:
    """Return rows for `nothing`, `full`, and every method at every budget. documents: `chunk + follow` ids each.

    calibration: ids of other text, for `bias=measured`. journal: figures of an earlier run, which are not measured
    again. progress: called with (figures done, figures in all), of which each document has one a row. Raises InputError
    for fewer than two documents and for one of another length.
    """
    if any(len(ids) != plan.chunk + plan.follow for ids in documents) or len(documents) < 2:
        raise InputError("two documents or more are needed, each of chunk + follow tokens")
    attachment = attach(model, tokenizer, mode="per_layer", positions="original")
    with ExitStack() as stack:
        stack.callback(attachment.detach)
        nothing, full = _Contender("nothing", 0), _Contender("full", plan.chunk)
        contenders = [nothing, full, *(_Contender(name, budget) for budget in plan.budgets for name in plan.methods)]
        table = _table(stack, attachment, calibration, plan.chunk) if calibrates(plan.methods) else ""
        run = _Run(attachment, plan.chunk, table, journal or Journal(None, {}))
        for index, ids in enumerate(documents):
            document = _Document(index + 1, list(ids[: plan.chunk]), list(ids[plan.chunk :]))
            for done, own in enumerate(contenders, start=index * len(contenders)):
                progress(done, len(documents) * len(contenders))
                own.add(run.part(document, own))
        progress(len(documents) * len(contenders), len(documents) * len(contenders))
    return [own.row(full, plan.chunk, run.plain) for own in contenders]


@dataclass(frozen=True, slots=True)
class _Document:
    """One numbered document in two parts, the chunk that is compressed and what follows it."""

    number: int
    before: list[int]
    after: list[int]


class _Run:
    """The measurements of a run. table: the file that `bias=measured` stands for. plain: seconds of plain forwards."""

    def __init__(self, attachment: Attachment, chunk: int, table: str, journal: Journal) -> None:
        self.attachment, self.chunk, self.table, self.journal = attachment, chunk, table, journal
        self.plain = 0.0
        self._captured: tuple[int, Captured] | None = None

    def part(self, document: _Document, own: _Contender) -> Mapping[str, Any]:
        """Return loss, bytes and seconds of one method on one document, of the journal where they are there."""
        key = f"document {document.number}, {own.name}"
        part: Mapping[str, Any] | None = self.journal.get(key)
        if part is None:
            part = self._measured(document, own)
            self.journal.put(key, part)
        self.plain += part.get("forward", 0.0)
        return part

    def _measured(self, document: _Document, own: _Contender) -> dict[str, float]:
        forward: dict[str, float] = {}
        if self._captured is None or self._captured[0] != document.number:
            began = time.perf_counter()
            self._captured = document.number, encode(self.attachment, document.before, needs_queries=True)
            forward = {"forward": time.perf_counter() - began} if own.method == "nothing" else {}
        began = time.perf_counter()
        layers, soft = _compressed(self.attachment, self._captured[1], own.method, own.budget, self.table)
        seconds = time.perf_counter() - began
        kept = [x for keys, values, _ in layers.values() for x in (keys, values)] if soft is None else [soft]
        layers = layers if soft is None else expanded(soft, self.attachment)
        loss = _loss(self.attachment, layers, self.chunk, document.after)
        size = sum(x.numel() * x.element_size() for x in kept)
        return {"loss": loss, "bytes": size, "seconds": seconds, **forward}


def calibrates(methods: Sequence[str]) -> bool:
    """Return whether `measure` needs `calibration` for any of the methods."""
    return any("=measured" in name for name in methods)


def _table(stack: ExitStack, attachment: Attachment, ids: Sequence[int], chunk: int) -> str:
    """Return a file with a calibrated table, removed with `stack`; no distance in a tree is beyond its chunk."""
    folder = Path(stack.enter_context(TemporaryDirectory()))
    found = calibrate(attachment, ids, distances=min(chunk, (attachment.trained_length or 4096) // 2), segments=40)
    return str(save_bias(attachment, found.table, {}, folder / "table.safetensors"))


def _compressed(
    attachment: Attachment, captured: Captured, name: str, budget: int, table: str
) -> tuple[_Layers, Tensor | None]:
    """Return what a method leaves of a chunk: K-V, or soft tokens. table: the file that `bias=measured` stands for."""
    if name == "nothing":
        return {}, None
    if name == "leaves":
        return _leaves(attachment, captured.token_ids, budget), None
    spec = "none" if name == "full" else with_budget(name, budget).replace("=measured", f"={table}")
    made = compressor(spec)
    payload = made.compress(captured, attachment)
    return dict(payload.layers), payload.soft


def _leaves(attachment: Attachment, ids: list[int], budget: int, leaf: int = _LEAF) -> _Layers:
    """Compress independent pieces, one behind the other; the first ones keep what does not divide."""
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
    """Return the mean loss of all tokens of `after` but the first."""
    cache = MemoryCache(attachment, start=chunk)
    if layers:
        cache.set_memory([[RecalledChunk(0, 0, layers)]])
    ids = torch.tensor([after], device=next(attachment.model.parameters()).device)
    with torch.no_grad():
        logits = attachment.model(input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True).logits
    return float(nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
