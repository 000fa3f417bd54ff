"""`kvbank eval`: measurements on real text."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from model_worker.errors import InputError

if TYPE_CHECKING:
    from model_worker.evaluate.compression import Row

evaluation = typer.Typer(no_args_is_help=True, help="Measure compression on real text.")


@evaluation.callback()
def _group() -> None:
    """With one command typer would drop the group's name."""


@evaluation.command()
def compression(
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A UTF-8 text or .gz, several times. Default: the Python reference."),
    ] = None,
    model: Annotated[str, typer.Option(help="kvbank-small (shipped), a model folder, or a hub id.")] = "kvbank-small",
    rope: Annotated[str | None, typer.Option(help="Rope scaling: linear:F, ntk:F or yarn:F.")] = None,
    chunk: Annotated[int, typer.Option(min=8, help="Tokens that are compressed.")] = 256,
    follow: Annotated[int, typer.Option(min=2, help="Tokens behind them whose loss is measured.")] = 64,
    documents: Annotated[int, typer.Option(min=2, help="Places in the texts, spread evenly.")] = 50,
    budget: Annotated[list[int] | None, typer.Option(help="Tokens kept, several times. Default: 16 32 64.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A compressor with N for the budget, such as tova:m=N; several times.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: loss against budget.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Loss of the text that follows a chunk, given the compressed chunk; with bytes and time, for every method."""
    from model_worker.evaluate.compression import METHODS, measure
    from model_worker.loading import load_model

    loaded, tokenizer = load_model(model, rope=rope)
    pieces = list(_pieces(tokenizer, text or [], chunk + follow, documents))
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("documents", total=len(pieces))
        rows = measure(
            loaded,
            tokenizer,
            pieces,
            chunk=chunk,
            follow=follow,
            budgets=budget or [16, 32, 64],
            methods=method or METHODS,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if plot is not None:
        plot.write_text(_plot(f"{model}: {len(pieces)} chunks of {chunk} tokens", rows, method or METHODS))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    Console().print(_table(f"{model}: {len(pieces)} chunks of {chunk} tokens, loss of the next {follow}", rows))


def _pieces(tokenizer: Any, texts: list[Path], length: int, count: int) -> Any:
    from model_worker.demo import reference_text
    from model_worker.evaluate.compression import cut
    from model_worker.train.books import read_book

    try:
        words = [read_book(path) for path in texts] or [reference_text()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text: {error}") from None
    for index, text in enumerate(words):
        share = count // len(words) + (index < count % len(words))
        yield from cut(tokenizer.encode(text, add_special_tokens=False, verbose=False), length, share)


def _table(title: str, rows: "list[Row]") -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ("loss, nats", "above full", "bytes/token", "ms/chunk", "x forward"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row.method),
            f"{row.loss:.3f} ± {row.loss - row.low:.3f}",
            f"{row.above:+.3f} ± {row.above_width:.3f}",
            f"{row.bytes_per_token:,.0f}",
            f"{1000 * row.seconds:.1f}",
            f"{row.forward:.2f}",
        )
    table.caption = "± 95 % over documents, differences paired; time without the chunk's forward, if it is used"
    return table


def _plot(title: str, rows: "list[Row]", methods: Any) -> str:
    from model_worker.evaluate.plot import lines

    level = {"full": next(row.loss for row in rows if row.method == "full")}
    own = [row for row in rows if row.method not in ("full", "nothing")]
    series = {
        name.replace(":m=N,", " ").replace(":m=N", ""): [(r.budget, r.loss) for r in own[index :: len(methods)]]
        for index, name in enumerate(methods)
    }
    return lines(title, "tokens kept", "loss of what follows, nats", series, level)
