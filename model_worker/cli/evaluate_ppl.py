"""`kvbank eval ppl` measures what a memory is worth to the loss of long texts, by the size of the memory.

The module is light to import: torch comes with the command.
"""

from pathlib import Path
from typing import Annotated

import typer

from kvbank.console.progress import progress
from model_worker.cli.measured_model import MeasuredModel
from model_worker.cli.measuring import JournalFile, about, check_journal, decides, measured_worker
from model_worker.cli.places import check_plot
from model_worker.cli.shown import AsJson, Shown, show, tables_of
from model_worker.errors import InputError
from model_worker.settings.base import Count, CountOrZero, at_least, described
from model_worker.settings.flags import takes


class PerplexityOptions(MeasuredModel):
    """Options of `kvbank eval ppl`."""

    text: Annotated[
        tuple[Path, ...], described("A UTF-8 text or .gz, several times. Default: the Python reference.")
    ] = ()
    tokens: Annotated[Count, described("Tokens that are read before those that are scored.")] = 65_536
    score: Annotated[int, at_least(2), described("Tokens that are scored, all of them.")] = 4096
    spans: Annotated[Count, described("Spans of each text: its beginning, and places that the seed draws.")] = 1
    sizes: Annotated[
        tuple[Count, ...],
        described("Tokens of the text that a memory finds, the last ones; several times.", flag="--memory"),
    ] = (4096, 32_768)
    other: Annotated[
        CountOrZero,
        described("Tokens of another text's memory; 0 leaves that memory out, as does the Python reference alone."),
    ] = 4096
    memlong: Annotated[CountOrZero, described("Windows of each text in MemLong's own protocol.")] = 0


@takes(PerplexityOptions)
def ppl(
    options: PerplexityOptions,
    out: JournalFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: gain by size of the memory.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loss of texts without a memory and with memories of several sizes, at the same local window.

    All scored tokens count, and the past alone chooses what is recalled. A gain is paired, token by token; its interval
    over blocks takes 512 neighbouring tokens as one value, the one over documents each document. Rare words (4 letters
    or more, at most 8 times in a document) show the gain by how long ago a word was last seen. MemLong's protocol, in
    which the scored tokens choose their memory, stands apart.

    Example: kvbank eval ppl --text frankenstein.txt.gz --tokens 8192 --score 1024 --memory 2048
    """
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.journal import Journal
    from model_worker.evaluate.memory_figures import perplexity_figure
    from model_worker.evaluate.memory_tables import cost_line, perplexity_tables
    from model_worker.evaluate.perplexity_run import PerplexityRun, Plan
    from model_worker.text_files import read_book, reference_text

    check_plot(plot)
    check_journal(out)
    if len({path.name for path in options.text}) < len(options.text):
        raise InputError("two texts have the same name: documents are told apart by the names of their files")
    texts = {path.name: read_book(path) for path in options.text} or {"Python reference": reference_text()}
    if not options.text:
        options = options.model_copy(update={"other": 0})  # there is no other text
    wanted = {"tokens", "score", "spans", "sizes", "other", "memlong", "seed"}
    plan = Plan(**options.model_dump(include=wanted))
    described_run = about("ppl", options)
    with measured_worker(options, query="past") as model, progress() as bars:
        journal = Journal(out, {**described_run, "decides": decides(model), "texts": texts})
        found = {**described_run, **PerplexityRun(model, texts, plan, journal, bars).report()}
    parts = tables_of(perplexity_tables(found), cost_line(found))
    shown = Shown(found, parts, drawn({"ppl.svg": perplexity_figure(found)}))
    show(shown, as_json=as_json, plot=plot)
