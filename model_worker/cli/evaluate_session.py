"""`kvbank eval session` measures what a long text and many questions behind it cost together.

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


class SessionOptions(MeasuredModel):
    """Options of `kvbank eval session`."""

    text: Annotated[
        tuple[Path, ...], described("What is read: a UTF-8 text or .gz, several times. Default: the Python reference.")
    ] = ()
    tokens: Annotated[TextTokens, described("Tokens that are read; a shorter text is repeated.")] = 100_000
    questions: Annotated[Count, described("Questions behind the text.")] = 100
    question: Annotated[int, at_least(2, 1024), described("Tokens of a question.")] = 16
    answer: Annotated[Count, described("Tokens of the longest answer.")] = 16
    plain_up_to: Annotated[
        CountOrZero, described("Longest text that the plain model keeps in its cache; 0 leaves that way out.")
    ] = 16_384


@takes(SessionOptions)
def session(
    options: SessionOptions,
    out: JournalFile = None,
    data: Annotated[
        Path | None, typer.Option(help="Keep the bank in this folder, so that a run that goes on need not read again.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: seconds by the number of questions.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read a long text once, ask many questions behind it, and count time, tokens, stored bytes and peak memory.

    Three ways do the same: recalled K-V (memory), the same hits read again as text, and the plain model with all K-V
    in its cache. The peak is that of the worker's memory, above the model's.

    Example: kvbank eval session --tokens 4000 --questions 10
    """
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.journal import Journal
    from model_worker.evaluate.memory_figures import session_figure
    from model_worker.evaluate.memory_tables import cost_line, session_tables
    from model_worker.evaluate.whole_session import Plan, WholeSession
    from model_worker.text_files import read_book, reference_text
    from model_worker.user_text import encode_text, readable

    check_plot(plot)
    check_journal(out)
    text = "\n\n".join([read_book(path) for path in options.text] or [reference_text()])
    plan = Plan(**options.model_dump(include={"tokens", "questions", "question", "answer", "plain_up_to", "seed"}))
    run = about("session", options)
    with measured_worker(options, data) as model, progress() as bars:
        journal = Journal(out, {**run, "decides": decides(model), "text": text})
        ids = encode_text(model.tokenizer, readable(text))
        found = {**run, **WholeSession(model, ids, plan, journal, bars).report()}
    parts = tables_of(session_tables(found), cost_line(found))
    show(Shown(found, parts, drawn({"session.svg": session_figure(found)})), as_json=as_json, plot=plot)
