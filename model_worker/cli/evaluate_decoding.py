"""`kvbank eval decoding` measures what a bounded cache costs and saves while decoding: TOVA, and windows beside it.

The module is light to import: torch comes with the command.
"""

import os
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

# Options that say which figures are wanted: another run goes on from those that it wants too.
_WHICH = ("rule", "share")


class DecodingOptions(RunsOn):
    """Options of `kvbank eval decoding`."""

    text: Annotated[
        tuple[Path, ...], described("A UTF-8 text or .gz, several times. Default: the Python reference.")
    ] = ()
    model: ModelName = SHIPPED
    rope: Rope = None
    tokens: Annotated[int, at_least(16), described("Tokens of a prompt, which the full cache keeps.")] = 256
    new: Annotated[int, at_least(2), described("Tokens decoded behind it, one by one.")] = 64
    share: Annotated[
        tuple[Count, ...], described("A bounded cache keeps the prompt's tokens divided by this; several times.")
    ] = (8,)
    rule: Annotated[
        tuple[str, ...], described("tova, sinks (4 of them and the last tokens) or window; several times.")
    ] = ("tova", "sinks", "window")
    documents: Annotated[int, at_least(2), described("Places in the texts, spread evenly.")] = 10


@takes(DecodingOptions)
def decoding(
    options: DecodingOptions,
    out: JournalFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: loss against tokens kept.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss, tokens a second and memory while decoding with a bounded cache, beside the full cache.

    A prompt is read in blocks, and the text's own next tokens are decoded one by one, so that all caches see the same.
    Each figure is noted in the file of --log as it comes.

    Example: kvbank eval decoding --model smollm2 --tokens 4096 --new 256 --share 8 --share 4
    """
    import torch

    from model_worker.evaluate.decoding import Plan, measure_decoding
    from model_worker.evaluate.decoding_report import decoding_figure, decoding_lines, decoding_tables
    from model_worker.evaluate.documents import text_by_text
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.journal import Journal
    from model_worker.text_files import read_book, reference_text

    check_plot(plot)
    check_journal(out)
    plan = Plan(options.tokens, options.new, options.share, options.rule)
    texts = [read_book(path) for path in options.text] or [reference_text()]
    loaded, tokenizer = load_quietly(options.model, rope=options.rope, **options.loading())
    documents = text_by_text(tokenizer, texts, plan.tokens + plan.new, options.documents)
    run = about("decoding", options)
    decided = {name: value for name, value in run["options"].items() if name not in _WHICH}
    journal = Journal(out, {"options": decided, "weights": weights_of(loaded, tokenizer), "documents": documents})
    with progress() as bars:
        rows = measure_decoding(loaded, tokenizer, documents, plan, journal, partial(bars, "figures"))
    machine = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    sizes = {"tokens": plan.tokens, "new": plan.new, "documents": len(documents)}
    found = {**run, **sizes, **machine, "rows": [asdict(row) for row in rows]}
    parts = tables_of(decoding_tables(found), *decoding_lines(found))
    show(Shown(found, parts, drawn({"decoding.svg": decoding_figure(found)})), as_json=as_json, plot=plot)
