"""`kvbank eval compression`, `passkey` and `homer-memory` measure what compression costs, and what HOMER needs of
memory.

The module is light to import: torch comes with the commands.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbank.console.progress import progress
from kvbank.console.table import Column
from model_worker.attachment.model_names import SHIPPED
from model_worker.cli.places import check_plot
from model_worker.cli.quiet import load_quietly
from model_worker.cli.shown import AsJson, Shown, Table, show
from model_worker.errors import InputError
from model_worker.settings.base import Count, CountOrZero, ModelName, Rope, Seed, Settings, at_least, described
from model_worker.settings.flags import takes
from model_worker.settings.model_run import RunsOn
from model_worker.user_text import encode_text, readable

if TYPE_CHECKING:
    from model_worker.evaluate.compression import Row
    from model_worker.evaluate.passkey import Score
    from model_worker.evaluate.peaks import PeaksReport

_MIB = 1 << 20


class CompressionOptions(RunsOn):
    """Options of `kvbank eval compression`."""

    text: Annotated[
        tuple[Path, ...], described("A UTF-8 text or .gz, several times. Default: the Python reference's second half.")
    ] = ()
    model: ModelName = SHIPPED
    rope: Rope = None
    chunk: Annotated[int, at_least(8), described("Tokens that are compressed.")] = 256
    follow: Annotated[int, at_least(2), described("Tokens behind them whose loss is measured.")] = 64
    documents: Annotated[int, at_least(2), described("Places in the texts, spread evenly.")] = 50
    budget: Annotated[tuple[Count, ...], described("Tokens kept, several times.")] = (16, 32, 64)
    method: Annotated[
        tuple[str, ...],
        described(
            "A compressor with N for the budget, such as tova:m=N; several times. Default: all that need no file."
        ),
    ] = ()


@takes(CompressionOptions)
def compression(
    options: CompressionOptions,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: loss against budget.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loss of the text that follows a chunk, given the compressed chunk; with bytes and time, by method.

    `bias=measured` in a method stands for a table that is calibrated on the first half of the Python reference.

    Example: kvbank eval compression --text book.txt --method tova:m=N --budget 32
    """
    from model_worker.evaluate.compression import METHODS, Plan, calibrates, measure
    from model_worker.evaluate.documents import text_by_text
    from model_worker.evaluate.figures import compression_figure, drawn
    from model_worker.text_files import read_book, reference_text

    check_plot(plot)
    reference = reference_text()
    calibrating, rest = reference[: len(reference) // 2], reference[len(reference) // 2 :]
    texts = [read_book(path) for path in options.text] or [rest]
    plan = Plan(options.chunk, options.follow, options.budget, options.method or METHODS)
    loaded, tokenizer = load_quietly(options.model, device=options.device, dtype=options.dtype, rope=options.rope)
    documents = text_by_text(tokenizer, texts, plan.chunk + plan.follow, options.documents)
    calibration = encode_text(tokenizer, readable(calibrating)) if calibrates(plan.methods) else ()
    with progress() as bars:
        rows = measure(loaded, tokenizer, documents, plan, calibration=calibration, progress=partial(bars, "documents"))
    found = [asdict(row) for row in rows]
    title = f"{options.model}: {len(documents)} chunks of {plan.chunk} tokens, loss of the next {plan.follow}"
    figure = compression_figure(options.model, plan.chunk, found)
    shown = Shown(found, [_compression_table(title, rows)], drawn({"compression.svg": figure}))
    show(shown, as_json=as_json, plot=plot)


def _compression_table(title: str, rows: "Sequence[Row]") -> Table:
    figures = ("loss, nats", "above full", "bytes/token", "ms/chunk", "x forward")
    cells = [
        (
            row.method,
            f"{row.loss:.3f} ± {row.loss - row.low:.3f}",
            f"{row.above:+.3f} ± {row.above_width:.3f}",
            f"{row.bytes_per_token:,.0f}",
            f"{1000 * row.seconds:.1f}",
            f"{row.forward:.2f}",
        )
        for row in rows
    ]
    caption = "± 95 % over documents, differences paired; time without the chunk's forward, if it is used"
    return Table([Column("method", "name"), *map(Column, figures)], cells, title, caption)


class PasskeyOptions(RunsOn):
    """Options of `kvbank eval passkey`."""

    text: Annotated[
        tuple[Path, ...], described("Filler: a UTF-8 text or .gz, several times. Default: Python reference.")
    ] = ()
    model: ModelName = SHIPPED
    rope: Rope = None
    times: Annotated[tuple[Count, ...], described("Lengths in trained lengths, several times.")] = (2, 4, 8)
    length: Annotated[tuple[Count, ...], described("Lengths in tokens instead, several times.")] = ()
    samples: Annotated[Count, described("Prompts of each length.")] = 20
    seed: Annotated[Seed, described("Other seeds plant other facts.")] = 0
    size: Annotated[Count | None, described("HOMER: tokens of a node; default: half as trained.")] = None
    leaf: Annotated[Count | None, described("HOMER, tuned: tokens of a leaf; default: size.")] = None
    warmup: Annotated[CountOrZero | None, described("HOMER, tuned: layers before the first merge.")] = None
    merges: Annotated[Count | None, described("HOMER, tuned: heights that run layers.")] = None
    pool: Annotated[Count, described("HOMER, tuned: neighbours of a significance, odd.")] = 1
    again: Annotated[bool, described("HOMER, tuned: run the question over the result.")] = False


@takes(PasskeyOptions)
def passkey(options: PasskeyOptions, as_json: AsJson = False) -> None:
    """Hide a fact in the middle of a long text and ask for it at the end: plain model, truncated, HOMER; in counts.

    The facts are those that kvbank-small was trained to copy, and any copying model can. With options of "HOMER, tuned"
    that way is run besides the published ones.

    Example: kvbank eval passkey --times 2 --times 4 --samples 5
    """
    from model_worker.evaluate.passkey import Tuning, measure_passkeys
    from model_worker.text_files import read_book, reference_text

    tuning = Tuning(**options.model_dump(include={"size", "leaf", "warmup", "merges", "pool", "again"}))
    filler = "\n\n".join([read_book(path) for path in options.text] or [reference_text()])
    loaded, tokenizer = load_quietly(options.model, device=options.device, dtype=options.dtype, rope=options.rope)
    lengths = options.length or tuple(factor * _trained(options, loaded) for factor in options.times)
    with progress() as bars:
        scores = measure_passkeys(
            loaded,
            tokenizer,
            filler,
            lengths,
            samples=options.samples,
            seed=options.seed,
            tuning=tuning,
            progress=partial(bars, "prompts"),
        )
    title = f"{options.model}, rope {options.rope or 'as trained'}: numbers told, of {options.samples}"
    show(Shown([asdict(score) for score in scores], [_passkey_table(title, scores)]), as_json=as_json)


def _trained(options: PasskeyOptions, loaded: Any) -> int:
    """Return the length that a model was trained for, which its configuration says before RoPE is scaled."""
    plain = load_quietly(options.model)[0] if options.rope else loaded
    return int(plain.config.max_position_embeddings)


def _passkey_table(title: str, scores: "Sequence[Score]") -> Table:
    lengths = list(dict.fromkeys(score.length for score in scores))
    columns = [Column("read", "word"), *(Column(f"{tokens:,} tokens") for tokens in lengths)]
    rows, refused = [], {}
    for way in dict.fromkeys(score.way for score in scores):
        own = {score.length: score for score in scores if score.way == way}
        rows.append((way, *("refused" if own[n].refused else str(own[n].right) for n in lengths)))
        refused[way] = next((score.refused for score in own.values() if score.refused), None)
    caption = "\n".join(f"{way}: {why}" for way, why in refused.items() if why)
    return Table(columns, rows, title, caption or None)


class HomerMemoryOptions(Settings):
    """Options of `kvbank eval homer-memory`."""

    model: Annotated[
        str | None, described("kvbank-small, a folder, or a hub id. Default: 16 layers of random weights.")
    ] = None
    length: Annotated[tuple[Count, ...], described("Tokens, several times.")] = (512, 1024, 2048, 4096, 8192, 16384)
    size: Annotated[int, at_least(21), described("Tokens of a node.")] = 256
    plain_up_to: Annotated[CountOrZero, described("Longest prompt of the plain prefill.")] = 8192


@takes(HomerMemoryOptions)
def homer_memory(
    options: HomerMemoryOptions,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: peak against length.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the peak tensor memory of a whole prompt by length: HOMER, plain prefill, fitted to log2(n) and to n.

    Example: kvbank eval homer-memory --length 512 --length 1024 --length 2048
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from model_worker.evaluate.figures import drawn, memory_figure
    from model_worker.evaluate.peaks import measure_peaks, random_model

    check_plot(plot)
    lengths = sorted(options.length)
    if len(set(lengths)) < 3:
        raise InputError("at least three lengths are needed to tell a line from a logarithm")
    loaded = random_model() if options.model is None else load_quietly(options.model)[0]
    with progress() as bars:
        report = measure_peaks(
            loaded,
            lengths,
            size=options.size,
            plain_up_to=options.plain_up_to,
            progress=partial(bars, "lengths"),
        )
    found = report.document()
    title = f"{options.model or 'random weights'}: peak MiB of a prompt above the weights"
    shown = Shown(found, [_memory_table(title, report)], drawn({"homer-memory.svg": memory_figure(found)}))
    show(shown, as_json=as_json, plot=plot)


def _memory_table(title: str, report: "PeaksReport") -> Table:
    rows = [
        (f"{p.length:,}", f"{p.homer / _MIB:.2f}", "" if p.plain is None else f"{p.plain / _MIB:.1f}")
        for p in report.peaks
    ]
    lines = (
        f"{who} {x}: {f.a / _MIB:.2f} + {f.b / _MIB:.3g} {x}, residual {f.residual / _MIB:.3f}"
        for who, both in report.fits.items()
        for x, f in both.items()
    )
    return Table([Column(name) for name in ("tokens", "HOMER", "plain prefill")], rows, title, "\n".join(lines))
