"""`kvbank eval facts` measures how many planted facts a model tells, by recall and by reading the same hits again.

The module is light to import: torch comes with the command.
"""

from pathlib import Path
from typing import Annotated

import typer

from kvbank.console.progress import progress
from model_worker.cli.measured_model import MeasuredModel, TextTokens
from model_worker.cli.measuring import JournalFile, about, check_journal, decides, measured_worker
from model_worker.cli.places import check_plot
from model_worker.cli.shown import AsJson, Shown, show, tables_of
from model_worker.settings.base import Count, CountOrZero, at_least, described
from model_worker.settings.flags import takes

# Options that do not decide what is stored of a text.
_ASKED = ("ask", "local", "stream", "capacity", "payload_cache", "device")


class FactsOptions(MeasuredModel):
    """Options of `kvbank eval facts`."""

    text: Annotated[
        tuple[Path, ...], described("Filler: a UTF-8 text or .gz, several times. Default: the Python reference.")
    ] = ()
    tokens: Annotated[
        tuple[TextTokens, ...],
        described("Tokens read before all facts are asked for, several times; facts stand within the fewest."),
    ] = (8192, 32_768)
    facts: Annotated[int, at_least(1, 10_000), described("Facts of each wording.")] = 20
    wording: Annotated[
        tuple[str, ...],
        described("number, colour, ... (an unknown one names all), or trained, or held-out; several times."),
    ] = ("number", "colour", "city")
    ask: Annotated[
        tuple[str, ...],
        described(
            "complete: the model completes the statement; question: it goes on behind a question and the beginning of "
            "the reply; chat: its template asks the question. Several times."
        ),
    ] = ("complete",)
    local: Annotated[
        tuple[str, ...],
        described("Tokens of other text in the window before the question, or full; several times."),
    ] = ("0", "full")
    stream: Annotated[
        bool, described("Ask in the stream that read the text, whose first tokens stay, rather than in a new one.")
    ] = False
    capacity: Annotated[CountOrZero, described("Tokens of the bank under eviction pressure; 0 leaves that out.")] = 0
    payload_cache: Annotated[Count, described("MiB of recalled K-V that the worker keeps.")] = 32


@takes(FactsOptions)
def facts(
    options: FactsOptions,
    out: JournalFile = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Keep what was read in this folder; another run of the same text and settings goes by it."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: share of facts by tokens read.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plant facts in a long text, read it, and ask for them far behind: by recalled K-V, and by reading the hits again.

    Each question is searched for once. The same hits are attended to as K-V (memory), or read as text before the
    question by the plain model (re-reading, the yardstick); `nothing` has neither. `chunk found` says how often a hit
    holds the answer. With --capacity the chunks are also written to a bank that holds so many tokens, of which every
    second fact is asked for all along.

    Example: kvbank eval facts --tokens 8192 --facts 5 --wording number --local 0
    """
    from model_worker.evaluate.facts_run import FactsRun, Plan
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.journal import Journal
    from model_worker.evaluate.memory_figures import facts_figure
    from model_worker.evaluate.memory_tables import cost_line, facts_tables
    from model_worker.remember.payload_cache import PayloadCache
    from model_worker.text_files import read_book, reference_text

    check_plot(plot)
    check_journal(out)
    text = "\n\n".join([read_book(path) for path in options.text] or [reference_text()])
    wanted = {"tokens", "facts", "wording", "ask", "local", "stream", "capacity", "seed"}
    plan = Plan(**options.model_dump(include=wanted))
    run = about("facts", options)
    payloads = PayloadCache(options.payload_cache << 20)
    with measured_worker(options, data, payload_cache=payloads) as model, progress() as bars:
        journal = Journal(out, {**run, "decides": decides(model), "text": text})
        asked = {name: value for name, value in run["options"].items() if name not in _ASKED}
        stored = {"options": asked, "decides": decides(model)}
        found = {**run, **FactsRun(model, text, plan, journal, bars, stored).report()}
    parts = tables_of(facts_tables(found), cost_line(found))
    show(Shown(found, parts, drawn({"facts.svg": facts_figure(found)})), as_json=as_json, plot=plot)
