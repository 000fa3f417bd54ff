"""`kvbank eval`: what compression costs in loss and in passkeys, and what HOMER needs of memory."""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbank.console.output import print_json
from kvbank.console.progress import progress
from kvbank.console.table import Column, print_table
from model_worker.cli.option_bounds import LARGEST_COUNT, LARGEST_SEED
from model_worker.cli.places import check_writable
from model_worker.cli.quiet import load_quietly
from model_worker.errors import InputError
from model_worker.user_text import encode_text, readable

if TYPE_CHECKING:
    from model_worker.evaluate.compression import Row
    from model_worker.evaluate.memory import Peak
    from model_worker.evaluate.passkey import Score

_MIB = 1 << 20

evaluation = typer.Typer(no_args_is_help=True, help="Measure compression: loss, passkeys, memory.")


@evaluation.command()
def compression(
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A UTF-8 text or .gz, several times. Default: the Python reference's second half."),
    ] = None,
    model: Annotated[str, typer.Option(help="kvbank-small (shipped), a model folder, or a hub id.")] = "kvbank-small",
    rope: Annotated[str | None, typer.Option(help="Rope scaling: linear:F, ntk:F or yarn:F.")] = None,
    chunk: Annotated[int, typer.Option(min=8, max=LARGEST_COUNT, help="Tokens that are compressed.")] = 256,
    follow: Annotated[
        int, typer.Option(min=2, max=LARGEST_COUNT, help="Tokens behind them whose loss is measured.")
    ] = 64,
    documents: Annotated[int, typer.Option(min=2, max=LARGEST_COUNT, help="Places in the texts, spread evenly.")] = 50,
    budget: Annotated[
        list[int] | None, typer.Option(min=1, max=LARGEST_COUNT, help="Tokens kept, several times. Default: 16 32 64.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A compressor with N for the budget, such as tova:m=N; several times.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: loss against budget.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Loss of the text that follows a chunk, given the compressed chunk; with bytes and time, for every method.

    `bias=measured` in a method stands for a table that is calibrated on the first half of the Python reference.

    Example: kvbank eval compression --text book.txt --method tova:m=N --budget 32
    """
    from model_worker.evaluate.compression import METHODS, calibrates, measure

    if plot is not None:
        check_writable(plot)
    first, second = _halves()
    words, methods = _words(text) if text else [second], method or METHODS
    loaded, tokenizer = load_quietly(model, rope=rope)
    pieces = list(_pieces(tokenizer, words, chunk + follow, documents))
    with progress() as show:
        rows = measure(
            loaded,
            tokenizer,
            pieces,
            chunk=chunk,
            follow=follow,
            budgets=budget or [16, 32, 64],
            methods=methods,
            calibration=_ids(tokenizer, first) if calibrates(methods) else (),
            progress=partial(show, "documents"),
        )
    if plot is not None:
        plot.write_text(_plot(f"{model}: {len(pieces)} chunks of {chunk} tokens", rows, methods), encoding="utf-8")
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    _print_compression(f"{model}: {len(pieces)} chunks of {chunk} tokens, loss of the next {follow}", rows)


@evaluation.command()
def passkey(
    text: Annotated[
        list[Path] | None, typer.Option(help="Filler: a UTF-8 text or .gz, several times. Default: Python reference.")
    ] = None,
    model: Annotated[str, typer.Option(help="kvbank-small (shipped), a model folder, or a hub id.")] = "kvbank-small",
    rope: Annotated[str | None, typer.Option(help="Rope scaling: linear:F, ntk:F or yarn:F.")] = None,
    times: Annotated[
        list[int] | None, typer.Option(min=1, max=LARGEST_COUNT, help="Lengths in trained lengths. Default: 2 4 8.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, max=LARGEST_COUNT, help="Lengths in tokens instead, several times.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Prompts of each length.")] = 20,
    seed: Annotated[int, typer.Option(min=-LARGEST_SEED, max=LARGEST_SEED, help="Other seeds plant other facts.")] = 0,
    size: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_COUNT, help="HOMER: tokens of a node; default: half as trained.")
    ] = None,
    leaf: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_COUNT, help="HOMER, tuned: tokens of a leaf; default: size.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_COUNT, help="HOMER, tuned: layers before the first merge.")
    ] = None,
    merges: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_COUNT, help="HOMER, tuned: heights that run layers.")
    ] = None,
    pool: Annotated[
        int, typer.Option(min=1, max=LARGEST_COUNT, help="HOMER, tuned: neighbours of a significance, odd.")
    ] = 1,
    again: Annotated[bool, typer.Option("--again", help="HOMER, tuned: run the question over the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """A fact in the middle of a long text, asked for at its end: plain model, truncated, and HOMER, in counts.

    The facts are those that kvbank-small was trained to copy, and any copying model can. With options of "HOMER, tuned"
    that way is run besides the published ones.

    Example: kvbank eval passkey --times 2 --times 4 --samples 5
    """
    from model_worker.evaluate.passkey import Tuning, measure_passkeys

    tuning, filler = Tuning(size, leaf, warmup, merges, pool, again), "\n\n".join(_words(text or []))
    loaded, tokenizer = load_quietly(model, rope=rope)
    trained = load_quietly(model)[0].config.max_position_embeddings if rope else loaded.config.max_position_embeddings
    lengths = length or [factor * trained for factor in times or (2, 4, 8)]
    with progress() as show:
        scores = measure_passkeys(
            loaded,
            tokenizer,
            filler,
            lengths,
            samples=samples,
            seed=seed,
            tuning=tuning,
            progress=partial(show, "prompts"),
        )
    if as_json:
        print_json([asdict(score) for score in scores])
        return
    _print_passkeys(f"{model}, rope {rope or 'as trained'}: numbers told, of {samples}", scores)


@evaluation.command("homer-memory")
def homer_memory(
    model: Annotated[
        str | None, typer.Option(help="kvbank-small, a folder, or a hub id. Default: 16 layers of random weights.")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(min=1, max=LARGEST_COUNT, help="Tokens, several times. Default: 512 to 16384, doubling."),
    ] = None,
    size: Annotated[int, typer.Option(min=21, max=LARGEST_COUNT, help="Tokens of a node.")] = 256,
    plain_up_to: Annotated[
        int, typer.Option(min=0, max=LARGEST_COUNT, help="Longest prompt of the plain prefill.")
    ] = 8192,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: peak against length.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Peak tensor memory of a whole prompt by length: HOMER against a plain prefill, fitted to log2(n) and to n.

    Example: kvbank eval homer-memory --length 512 --length 1024 --length 2048
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from model_worker.evaluate.memory import measure_peaks, random_model

    if plot is not None:
        check_writable(plot)
    lengths = sorted(length or [512 << step for step in range(6)])
    if len(set(lengths)) < 3:
        raise InputError("at least three lengths are needed to tell a line from a logarithm")
    loaded = random_model() if model is None else load_quietly(model)[0]
    with progress() as show:
        peaks = measure_peaks(
            loaded,
            lengths,
            size=size,
            plain_up_to=plain_up_to,
            progress=partial(show, "lengths"),
        )
    fits = _fits(peaks)
    if plot is not None:
        plot.write_text(_memory_plot(peaks), encoding="utf-8")
    if as_json:
        print_json({"peaks": [asdict(peak) for peak in peaks], "fits": fits})
        return
    rows = [
        (f"{p.length:,}", f"{p.homer / _MIB:.2f}", "" if p.plain is None else f"{p.plain / _MIB:.1f}") for p in peaks
    ]
    lines = (
        f"{who} {x}: {f['a'] / _MIB:.2f} + {f['b'] / _MIB:.3g} {x}, residual {f['residual'] / _MIB:.3f}"
        for who, both in fits.items()
        for x, f in both.items()
    )
    title = f"{model or 'random weights'}: peak MiB of a prompt above the weights"
    columns = [Column(name) for name in ("tokens", "HOMER", "plain prefill")]
    print_table(columns, rows, title=title, caption="\n".join(lines))


def _fits(peaks: "list[Peak]") -> dict[str, dict[str, dict[str, float]]]:
    """a, b and residual in bytes, of `log2(n)` and of `n`, for HOMER and for as many plain prefills as there are."""
    from model_worker.evaluate.memory import fit

    plain = [(p.length, p.plain) for p in peaks if p.plain is not None]
    found = {}
    for who, points in (("HOMER", [(p.length, p.homer) for p in peaks]), ("plain", plain)):
        if len(points) >= 3:
            n, y = zip(*points, strict=True)
            found[who] = {"log2(n)": asdict(fit([math.log2(x) for x in n], y)), "n": asdict(fit(n, y))}
    return found


def _memory_plot(peaks: "list[Peak]") -> str:
    from model_worker.evaluate.plot import lines

    series = {
        "HOMER": [(math.log2(p.length), p.homer / _MIB) for p in peaks],
        "plain prefill": [(math.log2(p.length), p.plain / _MIB) for p in peaks if p.plain is not None],
    }
    top = 4 * max(y for _, y in series["HOMER"])  # beyond, the plain line would press the other to the floor
    series["plain prefill"] = [point for point in series["plain prefill"] if point[1] <= top]
    named = {name: points for name, points in series.items() if points}
    return lines("peak memory of a prompt above the weights", "log2 of its tokens", "MiB", named, {})


def _print_passkeys(title: str, scores: "list[Score]") -> None:
    lengths = list(dict.fromkeys(score.length for score in scores))
    columns = [Column("read", "word"), *(Column(f"{tokens:,} tokens") for tokens in lengths)]
    rows, refused = [], {}
    for way in dict.fromkeys(score.way for score in scores):
        own = {score.length: score for score in scores if score.way == way}
        rows.append((way, *("refused" if own[n].refused else str(own[n].right) for n in lengths)))
        refused[way] = next((score.refused for score in own.values() if score.refused), None)
    caption = "\n".join(f"{way}: {why}" for way, why in refused.items() if why)
    print_table(columns, rows, title=title, caption=caption or None)


def _words(texts: list[Path]) -> list[str]:
    from model_worker.demo.story import reference_text
    from model_worker.train.books import read_book

    return [read_book(path) for path in texts] or [reference_text()]


def _halves() -> tuple[str, str]:
    """The Python reference: what is calibrated on, and what is evaluated where no text is given."""
    from model_worker.demo.story import reference_text

    words = reference_text()
    return words[: len(words) // 2], words[len(words) // 2 :]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return encode_text(tokenizer, readable(text))


def _pieces(tokenizer: Any, words: list[str], length: int, count: int) -> Iterator[list[int]]:
    from model_worker.evaluate.compression import cut

    for index, text in enumerate(words):
        share = count // len(words) + (index < count % len(words))
        yield from cut(_ids(tokenizer, text), length, share)


def _print_compression(title: str, rows: "list[Row]") -> None:
    figures = ("loss, nats", "above full", "bytes/token", "ms/chunk", "x forward")
    shown = [
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
    print_table([Column("method", "name"), *map(Column, figures)], shown, title=title, caption=caption)


def _plot(title: str, rows: "list[Row]", methods: Any) -> str:
    from model_worker.evaluate.plot import lines

    level = {"full": next(row.loss for row in rows if row.method == "full")}
    own = [row for row in rows if row.method not in ("full", "nothing")]
    series = {
        name.replace(":m=N,", " ").replace(":m=N", ""): [(r.budget, r.loss) for r in own[index :: len(methods)]]
        for index, name in enumerate(methods)
    }
    return lines(title, "tokens kept", "loss of what follows, nats", series, level)
