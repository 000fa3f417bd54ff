"""`kvbank eval icae` and `icae-latency` measure what memory slots keep of a text, and what reading them saves.

The module is light to import: torch comes with the commands.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbank.console.progress import progress
from kvbank.console.table import Column
from model_worker.attachment.model_names import SHIPPED
from model_worker.cli.places import make_plot_folder
from model_worker.cli.quiet import load_quietly
from model_worker.cli.shown import AsJson, Shown, Table, show
from model_worker.settings.base import Count, CountOrZero, Device, ModelName, Seed, Settings, at_least, described
from model_worker.settings.flags import takes

if TYPE_CHECKING:
    from torch import Tensor

    from model_worker.evaluate.adapter import Evaluation
    from model_worker.evaluate.findings import Finding
    from model_worker.evaluate.latency import Latency
    from model_worker.evaluate.restoration import Restoration
    from model_worker.icae.model import Icae

SHIPPED_ADAPTER = "kvbank-small-icae"


class AdapterOptions(Settings):
    """Options of `kvbank eval icae`."""

    text: Annotated[
        tuple[Path, ...], described("A UTF-8 text or .gz, several times. Default: the Python reference.")
    ] = ()
    model: ModelName = SHIPPED
    adapter: Annotated[
        tuple[str, ...],
        described(
            "ICAE adapter of the model: kvbank-small-icae (shipped), a folder, or a hub id. Several times: compares "
            "them, other seeds or other numbers of slots, on the same text."
        ),
    ] = (SHIPPED_ADAPTER,)
    documents: Annotated[int, at_least(2), described("Places in the texts, spread evenly.")] = 128
    span: Annotated[
        int | None, at_least(4), described("Tokens at which all is compared. Default: a full span of the first.")
    ] = None
    follow: Annotated[int, at_least(2), described("Tokens whose loss behind a context is measured.")] = 64
    leave: Annotated[CountOrZero, described("First of them that carry no loss, for any reader.")] = 8
    seed: Annotated[Seed, described("Seed of shuffled and random text.")] = 0
    device: Device = "cpu"


@dataclass(frozen=True)
class _Measured:
    """One adapter, its name and its figures."""

    name: str
    adapter: "Icae"
    found: "Evaluation"
    findings: "list[Finding]"
    margins: "list[Finding]"

    def document(self) -> dict[str, Any]:
        """Return the figures as plain values, for JSON."""
        config = self.adapter.config
        return {
            "adapter": self.name,
            "digest": self.adapter.digest,
            "slots": config.slots,
            "rate": config.rate,
            "interface": config.interface,
            "positions": config.positions,
            **self.found.summary(),
            "facts": [asdict(finding) for finding in self.findings],
            "margins": [asdict(finding) for finding in self.margins],
        }


@takes(AdapterOptions)
def icae(
    options: AdapterOptions,
    plots: Annotated[
        Path | None,
        typer.Option(help="Also write icae-length.svg, icae-slots.svg, icae-continuation.svg there."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Restore and continue text from an ICAE adapter's memory slots, with the six findings of the paper checked.

    Losses are in nats per token; accuracy is teacher-forced; exact prefix is the share of a text that a free-running
    restoration gets right before its first error; BLEU is sacrebleu's. `other` reads another text's slots, `plain` has
    none.

    Example: kvbank eval icae --adapter run/adapter --text book.txt --documents 16
    """
    from model_worker.attachment.loading import device_named
    from model_worker.evaluate.adapter import plan
    from model_worker.evaluate.documents import in_turn
    from model_worker.evaluate.figures import adapter_figures, drawn
    from model_worker.icae.model import Icae
    from model_worker.text_files import read_book, reference_text

    device = device_named(options.device)
    make_plot_folder(plots)
    loaded, tokenizer = load_quietly(options.model, device=device)
    adapters = [Icae.from_pretrained(loaded, name) for name in options.adapter]
    span = options.span or adapters[0].config.capacity
    plans = [plan(own, follow=options.follow, leave=options.leave, span=span) for own in adapters]
    texts = [read_book(path) for path in options.text] or [reference_text()]
    length = max(own.document for own in plans)
    pieces = in_turn(tokenizer, texts, length, options.documents)
    with progress() as bars:
        measured = [
            _measured(name, own, pieces, planned, tokenizer, options.seed, bars)
            for name, own, planned in zip(options.adapter, adapters, plans, strict=True)
        ]
    found = [own.document() for own in measured]
    shown = Shown(found, _parts(options.model, len(pieces), measured), drawn(adapter_figures(options.model, found)))
    show(shown, as_json=as_json, plot=plots)


def _measured(
    name: str, adapter: "Icae", pieces: list[list[int]], plan: Any, tokenizer: Any, seed: int, bars: Any
) -> _Measured:
    from model_worker.evaluate.adapter import measure
    from model_worker.evaluate.findings import findings, margins

    found = measure(
        adapter,
        pieces,
        plan,
        partial(tokenizer.decode, skip_special_tokens=True),
        special=tokenizer.all_special_ids,
        seed=seed,
        progress=partial(bars, name),
    )
    return _Measured(name, adapter, found, findings(found), margins(found))


class LatencyOptions(Settings):
    """Options of `kvbank eval icae-latency`."""

    model: Annotated[str, described("random:0.5b, random:1b or random:tiny (random weights), or a model by name.")] = (
        "random:0.5b"
    )
    chunk: Annotated[tuple[Count, ...], described("Tokens of a chunk, several times.")] = (512, 1024)
    slots: Annotated[Count, described("Slots of a span.")] = 128
    rate: Annotated[Count, described("Tokens a slot.")] = 4
    prompt: Annotated[Count, described("Tokens asked.")] = 16
    answer: Annotated[int, at_least(2), described("Tokens answered.")] = 32
    rounds: Annotated[Count, described("Rounds, over which medians are taken.")] = 5
    dtype: Annotated[str, described("Dtype of random weights.")] = "float32"
    device: Device = "cpu"


@takes(LatencyOptions)
def icae_latency(options: LatencyOptions, as_json: AsJson = False) -> None:
    """Measure the time to an answer's first token, and to its last, from slots at hand against reading the whole chunk.

    Time depends on shapes alone: adapters are random, and so are the weights of `random:` models.

    Example: kvbank eval icae-latency --model random:tiny --rounds 3
    """
    from model_worker.evaluate.latency import measure_latency

    net = _net(options)
    with progress() as bars:
        rows = measure_latency(
            net,
            options.chunk,
            slots=options.slots,
            rate=options.rate,
            prompt=options.prompt,
            answer=options.answer,
            rounds=options.rounds,
            progress=partial(bars, "rounds"),
        )
    title = f"{options.model}, {options.dtype}, {options.device}: prompt of {options.prompt} tokens"
    show(Shown([asdict(row) for row in rows], [_latency_table(title, rows)]), as_json=as_json)


def _net(options: LatencyOptions) -> Any:
    from model_worker.attachment.loading import device_named, dtype_named
    from model_worker.evaluate.latency import random_model

    kind, place = dtype_named(options.dtype), device_named(options.device)
    if not options.model.startswith("random:"):
        return load_quietly(options.model, device=place)[0]
    return random_model(options.model.removeprefix("random:"), kind).to(place)


# -- tables -------------------------------------------------------------------------------------------------------


def _parts(model: str, texts: int, measured: Sequence[_Measured]) -> Iterator[Table | str]:
    """Yield the tables and lines of all adapters; of several, one that compares them comes first."""
    if len(measured) > 1:
        lines = [(own.name, own.found.contents["natural"]) for own in measured]
        yield _restored(f"{model}: {texts} texts, restored", "adapter", lines)
    for own in measured:
        title = f"{model}, {own.name}: {texts} texts"
        yield _restorations(f"{title}, restored", own.found)
        yield _continuations(f"{title}, continued", own.found)
        for heading, made in (("Findings of the paper", own.findings), ("Slots carry their text", own.margins)):
            yield heading
            yield from (f"  {'shown' if each.shown else 'fails'}  {each.name}: {each.figures}" for each in made)


def _restorations(title: str, found: "Evaluation") -> Table:
    lines: list[tuple[str, Restoration]] = [("by length", own) for own in found.lengths]
    lines += [("in more pieces", own) for own in found.parts[1:]]
    lines += [(name, own) for name, own in found.contents.items() if name != "natural"]
    return _restored(title, "text", lines)


def _restored(title: str, first: str, lines: "Sequence[tuple[str, Restoration]]") -> Table:
    from model_worker.evaluate.interval import interval

    figures = ("tokens", "slots", "own", "other", "plain", "accuracy", "(plain)", "BLEU", "prefix")
    rows = []
    for name, own in lines:
        found = (own.own.nats, own.other.nats, own.plain.nats, own.own.right, own.plain.right)
        values = [_mean(values) for values in found]
        bleu = "-" if own.own.bleu is None else f"{own.own.bleu:.1f}"
        rows.append((name, str(own.tokens), str(own.slots), *values, bleu, _mean(own.own.prefix)))
    nats = max(interval(reader.nats).width for _, own in lines for reader in (own.own, own.other, own.plain))
    right = max(interval(own.own.right).width for _, own in lines)
    caption = (
        f"nats per token with own slots, another text's, none; 95 %: ± {nats:.2f} nats, ± {right:.3f} accuracy at most"
    )
    return Table([Column(first, "name"), *map(Column, figures)], rows, title, caption)


def _continuations(title: str, found: "Evaluation") -> Table:
    from model_worker.evaluate.interval import interval

    columns = [
        Column(name) for name in ("context", "slots", "all of it", "its slots", "as many last tokens", "nothing")
    ]
    each = [(own, (own.full, own.slots, own.last, own.none)) for own in found.continuations]
    rows = [(str(own.context), str(own.budget), *map(_mean, readers)) for own, readers in each]
    width = max(interval(values).width for _, readers in each for values in readers)
    caption = f"nats per token of the same following tokens; 95 %: ± {width:.2f} at most, differences less"
    return Table(columns, rows, title, caption)


def _latency_table(title: str, rows: "Sequence[Latency]") -> Table:
    from model_worker.evaluate.latency import TARGET

    columns = [Column(name) for name in ("chunk", "reads", "of", "first token, ms", "x", "whole, ms", "x")]
    columns[1] = Column("reads", "word")
    shown = []
    for row in rows:
        times = f"{1000 * row.first:,.0f}", f"{row.ratio:.1f}", f"{1000 * row.whole:,.0f}", f"{row.whole_ratio:.1f}"
        shown.append((str(row.tokens), row.contender, str(row.read), *times))
    last = rows[-1]
    loads = [row.load for row in rows]
    caption = (
        f"of: positions read; x: full over it (target: {TARGET:g} to the first, from 512 on); whole: {last.answer} "
        f"tokens; medians of {last.rounds} interleaved rounds, load average {min(loads):.1f} to {max(loads):.1f}"
    )
    return Table(columns, shown, title, caption)


def _mean(values: "Tensor | None") -> str:
    return "-" if values is None else f"{float(values.mean()):.3f}"
