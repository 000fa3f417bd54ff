"""`kvbank eval compression` measures what compression costs in loss, bytes and time, on real text.

The module is light to import: torch comes with the command.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kvbank.console.progress import progress
from model_worker.attachment.model_names import SHIPPED
from model_worker.cli.measuring import JournalFile, about, check_journal, weights_of
from model_worker.cli.places import check_plot
from model_worker.cli.quiet import load_quietly
from model_worker.cli.shown import AsJson, Shown, show, tables_of
from model_worker.settings.base import Count, ModelName, Rope, at_least, described
from model_worker.settings.flags import takes
from model_worker.settings.model_run import RunsOn
from model_worker.user_text import encode_text, readable

# Options that say which figures are wanted: another run goes on from those that it wants too.
_WHICH = ("method", "budget")


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
            "A compressor with N for the budget, such as tova:m=N; several times. Default: all that need no file, but "
            "for tova:m=N,block=1, which runs the model for each token."
        ),
    ] = ()


@takes(CompressionOptions)
def compression(
    options: CompressionOptions,
    out: JournalFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: loss against budget.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loss of the text that follows a chunk, given the compressed chunk; with bytes and time, by method.

    `full` has the whole chunk, `nothing` none of it; the methods are compared with `full` on the same documents. Each
    figure is noted in the file of --log as it comes, and is taken from there by a run of more methods or budgets.
    `bias=measured` in a method stands for a table that is calibrated on the first half of the Python reference.

    Example: kvbank eval compression --text book.txt --method tova:m=N --method window:m=N --budget 32
    """
    from model_worker.evaluate.compression import METHODS, Plan, calibrates, measure
    from model_worker.evaluate.compression_report import compression_lines, compression_picture, compression_tables
    from model_worker.evaluate.documents import text_by_text
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.journal import Journal
    from model_worker.text_files import read_book, reference_text

    check_plot(plot)
    check_journal(out)
    plan = Plan(options.chunk, options.follow, options.budget, options.method or METHODS)
    reference = reference_text()
    calibrating, rest = reference[: len(reference) // 2], reference[len(reference) // 2 :]
    texts = [read_book(path) for path in options.text] or [rest]
    loaded, tokenizer = load_quietly(options.model, rope=options.rope, **options.loading())
    documents = text_by_text(tokenizer, texts, plan.chunk + plan.follow, options.documents)
    calibration = encode_text(tokenizer, readable(calibrating)) if calibrates(plan.methods) else ()
    run = about("compression", options)
    decided = {name: value for name, value in run["options"].items() if name not in _WHICH}
    journal = Journal(out, {"options": decided, "weights": weights_of(loaded, tokenizer), "documents": documents})
    with progress() as bars:
        tell = partial(bars, "figures")
        rows = measure(loaded, tokenizer, documents, plan, calibration=calibration, journal=journal, progress=tell)
    sizes = {"chunk": plan.chunk, "follow": plan.follow, "documents": len(documents)}
    found = {**run, **sizes, "rows": [asdict(row) for row in rows]}
    parts = tables_of(compression_tables(found), *compression_lines(found))
    show(Shown(found, parts, drawn({"compression.svg": compression_picture(found)})), as_json=as_json, plot=plot)
