"""`kvbank eval icae` and `kvbank eval icae-latency`: what memory slots keep of a text, and what reading them saves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbank.console.output import print_json, print_line
from kvbank.console.progress import progress
from kvbank.console.table import Column, print_table
from model_worker.cli.option_bounds import LARGEST_COUNT, LARGEST_SEED
from model_worker.cli.places import make_writable
from model_worker.cli.quiet import load_quietly
from model_worker.errors import InputError
from model_worker.user_text import encode_text, readable

if TYPE_CHECKING:
    from torch import Tensor

    from model_worker.evaluate.icae import Evaluation
    from model_worker.evaluate.icae_facts import Fact
    from model_worker.evaluate.icae_latency import Latency
    from model_worker.evaluate.restoration import Reader, Restoration
    from model_worker.icae.model import Icae

SHIPPED_ADAPTER = "kvbank-small-icae"
_Curves = dict[str, list[tuple[float, float]]]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def add_icae_commands(evaluation: typer.Typer) -> None:
    """Put both into `kvbank eval`."""
    evaluation.command("icae")(icae)
    evaluation.command("icae-latency")(icae_latency)


@dataclass(frozen=True)
class _Measured:
    """One adapter and its figures."""

    name: str
    adapter: "Icae"
    found: "Evaluation"
    facts: "list[Fact]"
    margins: "list[Fact]"


def icae(
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A UTF-8 text or .gz, several times. Default: the Python reference."),
    ] = None,
    model: Annotated[str, typer.Option(help="kvbank-small (shipped), a model folder, or a hub id.")] = "kvbank-small",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="ICAE adapter of the model: kvbank-small-icae (shipped), a folder, or a hub id. Several times: "
            "compares them, other seeds or other numbers of slots, on the same text."
        ),
    ] = None,
    documents: Annotated[int, typer.Option(min=2, max=LARGEST_COUNT, help="Places in the texts, spread evenly.")] = 128,
    span: Annotated[
        int | None,
        typer.Option(
            min=4, max=LARGEST_COUNT, help="Tokens at which all is compared. Default: a full span of the first."
        ),
    ] = None,
    follow: Annotated[
        int, typer.Option(min=2, max=LARGEST_COUNT, help="Tokens whose loss behind a context is measured.")
    ] = 64,
    leave: Annotated[
        int, typer.Option(min=0, max=LARGEST_COUNT, help="First of them that carry no loss, for any reader.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=-LARGEST_SEED, max=LARGEST_SEED, help="Of shuffled and random text.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "cpu",
    plots: Annotated[
        Path | None,
        typer.Option(help="Also write icae-length.svg, icae-slots.svg, icae-continuation.svg there."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Restore and continue text from an ICAE adapter's memory slots, with the six findings of the paper checked.

    Losses are in nats per token; accuracy is teacher-forced; exact prefix is the share of a text that a free-running
    restoration gets right before its first error; BLEU is sacrebleu's. `other` reads another text's slots, `plain` has
    none.

    Example: kvbank eval icae --adapter run/adapter --text book.txt --documents 16
    """
    from model_worker.attachment.loading import device_named
    from model_worker.evaluate import icae as evaluate
    from model_worker.evaluate.icae_facts import facts, margins
    from model_worker.icae.model import Icae

    device = device_named(device)
    if plots is not None:
        make_writable(plots)
    loaded, tokenizer = load_quietly(model, device=device)
    names = adapter or [SHIPPED_ADAPTER]
    adapters = [Icae.from_pretrained(loaded, name) for name in names]
    span = span or adapters[0].config.capacity
    plans = [evaluate.plan(own, follow=follow, leave=leave, span=span) for own in adapters]
    pieces = _documents(tokenizer, text or [], max(what.document for what in plans), documents)
    measured = []
    with progress() as show:
        for name, own, what in zip(names, adapters, plans, strict=True):
            found = evaluate.measure(
                own,
                pieces,
                what,
                lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
                special=tokenizer.all_special_ids,
                seed=seed,
                progress=partial(show, name),
            )
            measured.append(_Measured(name, own, found, facts(found), margins(found)))
    if plots is not None:
        _write_plots(plots, model, measured)
    if as_json:
        print_json([_summary(own) for own in measured])
        return
    if len(measured) > 1:
        _print_comparison(f"{model}: {len(pieces)} texts, restored", measured)
    for made in measured:
        _print(f"{model}, {made.name}: {len(pieces)} texts", made)


def icae_latency(
    model: Annotated[
        str, typer.Option(help="random:0.5b, random:1b or random:tiny (random weights), or a model by name.")
    ] = "random:0.5b",
    chunk: Annotated[
        list[int] | None, typer.Option(min=1, max=LARGEST_COUNT, help="Tokens, several times. Default: 512 1024.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Of a span.")] = 128,
    rate: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Tokens a slot.")] = 4,
    prompt: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Tokens asked.")] = 16,
    answer: Annotated[int, typer.Option(min=2, max=LARGEST_COUNT, help="Tokens answered.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Medians are over so many.")] = 5,
    dtype: Annotated[str, typer.Option(help="Of random weights.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "cpu",
    as_json: JSON = False,
) -> None:
    """Time to an answer's first token, and to its last, from slots at hand against reading the whole chunk.

    Time depends on shapes alone: adapters are random, and so are the weights of `random:` models.

    Example: kvbank eval icae-latency --model random:tiny --rounds 3
    """
    from model_worker.evaluate.icae_latency import measure_latency

    net = _net(model, dtype, device)
    with progress() as show:
        rows = measure_latency(
            net,
            chunk or [512, 1024],
            slots=slots,
            rate=rate,
            prompt=prompt,
            answer=answer,
            rounds=rounds,
            progress=partial(show, "rounds"),
        )
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    _print_latency(f"{model}, {dtype}, {device}: prompt of {prompt} tokens", rows)


def _net(model: str, dtype: str, device: str) -> Any:
    from model_worker.attachment.loading import device_named, dtype_named
    from model_worker.evaluate.icae_latency import random_model

    kind, place = dtype_named(dtype), device_named(device)
    if not model.startswith("random:"):
        return load_quietly(model, device=place)[0]
    return random_model(model.removeprefix("random:"), kind).to(place)


def _documents(tokenizer: Any, paths: list[Path], length: int, count: int) -> list[list[int]]:
    """Pieces spread evenly over each text; texts take turns."""
    from model_worker.demo.story import reference_text
    from model_worker.evaluate.compression import cut
    from model_worker.train.books import read_book

    try:
        texts = [read_book(path) for path in paths] or [reference_text()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text: {error}") from None
    each = -(-count // len(texts))
    cuts = [list(cut(encode_text(tokenizer, readable(t)), length, each)) for t in texts]
    turns = [own[index] for index in range(each) for own in cuts if index < len(own)]
    if len(turns) < 2:
        raise InputError(f"the text is too short for two pieces of {length} tokens")
    return turns[:count]


# -- tables -------------------------------------------------------------------------------------------------------


def _print(title: str, own: _Measured) -> None:
    _print_restorations(f"{title}, restored", own.found)
    _print_continuations(f"{title}, continued", own.found)
    for heading, made in (("Findings of the paper", own.facts), ("Slots carry their text", own.margins)):
        print_line(heading)
        for fact in made:
            print_line(f"  {'shown' if fact.shown else 'fails'}  {fact.name}: {fact.figures}")


def _print_restorations(title: str, found: "Evaluation") -> None:
    lines: list[tuple[str, Restoration]] = [("by length", own) for own in found.lengths]
    lines += [("in more pieces", own) for own in found.parts[1:]]
    lines += [(name, own) for name, own in found.contents.items() if name != "natural"]
    _print_restored(title, "text", lines)


def _print_comparison(title: str, measured: Sequence[_Measured]) -> None:
    """Several adapters at the length that is common to them."""
    _print_restored(title, "adapter", [(own.name, own.found.contents["natural"]) for own in measured])


def _print_restored(title: str, first: str, lines: "Sequence[tuple[str, Restoration]]") -> None:
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
    print_table([Column(first, "name"), *map(Column, figures)], rows, title=title, caption=caption)


def _print_continuations(title: str, found: "Evaluation") -> None:
    from model_worker.evaluate.interval import interval

    columns = [
        Column(name) for name in ("context", "slots", "all of it", "its slots", "as many last tokens", "nothing")
    ]
    each = [(own, (own.full, own.slots, own.last, own.none)) for own in found.continuations]
    rows = [(str(own.context), str(own.budget), *map(_mean, readers)) for own, readers in each]
    width = max(interval(values).width for _, readers in each for values in readers)
    caption = f"nats per token of the same following tokens; 95 %: ± {width:.2f} at most, differences less"
    print_table(columns, rows, title=title, caption=caption)


def _print_latency(title: str, rows: "Sequence[Latency]") -> None:
    from model_worker.evaluate.icae_latency import TARGET

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
    print_table(columns, shown, title=title, caption=caption)


def _mean(values: "Tensor | None") -> str:
    return "-" if values is None else f"{float(values.mean()):.3f}"


def _summary(own: _Measured) -> dict[str, Any]:
    config = own.adapter.config
    return {
        "adapter": own.name,
        "digest": own.adapter.digest,
        "slots": config.slots,
        "rate": config.rate,
        "interface": config.interface,
        "positions": config.positions,
        **own.found.summary(),
        "facts": [asdict(fact) for fact in own.facts],
        "margins": [asdict(fact) for fact in own.margins],
    }


# -- plots --------------------------------------------------------------------------------------------------------


def _write_plots(folder: Path, model: str, measured: Sequence[_Measured]) -> None:
    from model_worker.evaluate.plot import lines

    by_length: _Curves = {}
    by_slots: _Curves = {}
    after: _Curves = {}
    levels: dict[str, float] = {}
    for own in measured:
        label = "" if len(measured) == 1 else f"{Path(own.name).name}: "
        found, whole = own.found, own.found.contents["natural"]
        by_length |= _curves(label, found.lengths, lambda made: made.tokens)
        by_slots |= _curves(label, found.parts, lambda made: made.slots)
        after["all of it"] = [(c.context, float(c.full.mean())) for c in found.continuations]
        after[f"{label}its slots"] = [(c.context, float(c.slots.mean())) for c in found.continuations]
        last = [(float(c.context), float(c.last.mean())) for c in found.continuations]
        if last not in after.values():  # adapters of one rate share it
            after[f"{'' if own is measured[0] else label}as many last tokens"] = last
        levels = {"nothing": float(found.continuations[0].none.mean())}
    (folder / "icae-length.svg").write_text(
        lines(f"{model}: restoration by length", "tokens", "share", by_length, {}), encoding="utf-8"
    )
    (folder / "icae-slots.svg").write_text(
        lines(f"{model}: {whole.tokens} tokens by the slots they get", "slots", "share", by_slots, {}), encoding="utf-8"
    )
    (folder / "icae-continuation.svg").write_text(
        lines(f"{model}: loss of what follows", "tokens of context", "nats per token", after, levels), encoding="utf-8"
    )


def _curves(label: str, made: "Sequence[Restoration]", at: Any) -> _Curves:
    """Accuracy, and BLEU as a share of 100; of one adapter alone also other readers and exact prefixes."""
    shares: dict[str, Any] = {
        "accuracy": lambda r: _share(r.own),
        "BLEU / 100": lambda r: None if r.own.bleu is None else r.own.bleu / 100,
    }
    if not label:
        shares |= {
            "accuracy, other's slots": lambda r: _share(r.other),
            "accuracy, no slots": lambda r: _share(r.plain),
            "exact prefix": lambda r: None if r.own.prefix is None else float(r.own.prefix.mean()),
        }
    curves = {label + name: [(at(own), share(own)) for own in made] for name, share in shares.items()}
    return {name: points for name, points in curves.items() if all(y is not None for _, y in points)}


def _share(reader: "Reader") -> float:
    return float(reader.right.mean())
