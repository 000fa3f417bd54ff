"""`kvbank eval ttft` measures the time to the first token of an answer, behind histories of several lengths.

The module is light to import: torch comes with the command.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from kvbank.console.progress import progress
from model_worker.cli.measured_model import MeasuredModel, TextTokens
from model_worker.cli.measuring import about, measured_worker
from model_worker.cli.places import check_plot
from model_worker.cli.shown import AsJson, Shown, show, tables_of
from model_worker.settings.base import Count, CountOrZero, at_least, described
from model_worker.settings.flags import takes


class FirstTokenOptions(MeasuredModel):
    """Options of `kvbank eval ttft`."""

    text: Annotated[
        tuple[Path, ...], described("The history: a UTF-8 text or .gz, several times. Default: the Python reference.")
    ] = ()
    history: Annotated[tuple[TextTokens, ...], described("Tokens of history, several times.")] = (
        1024,
        4096,
        16_384,
        102_400,
    )
    question: Annotated[int, at_least(2, 1024), described("Tokens of the question.")] = 16
    rounds: Annotated[Count, described("Rounds that count, after the first.")] = 11
    all_up_to: Annotated[CountOrZero, described("Longest history that is read again as a whole.")] = 8192
    sessions: Annotated[
        bool, described("Also time a worker that goes on with a session of each history, lease and window included.")
    ] = False


@takes(FirstTokenOptions)
def ttft(
    options: FirstTokenOptions,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: time by length of the history.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure time, tokens and memory to the first token of an answer: recalled K-V, re-reading the hits or all.

    The ways take turns, and each searches for itself. `memory` gets all K-V from the service; `memory, held` has them
    from an earlier recall. Filling the bank is no part of the time: its chunks have the texts and embeddings of the
    history, and the K-V of a few of them.

    A session: kvbank eval ttft --model smollm2 --history 20000 --sessions --all-up-to 20000

    Example: kvbank eval ttft --history 1024 --history 4096 --rounds 5 --top-k 8
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which measures the peaks, else tells of itself
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.first_token import FirstTokenRun, Plan
    from model_worker.evaluate.memory_figures import first_token_figure
    from model_worker.evaluate.memory_tables import cost_line, first_token_tables
    from model_worker.text_files import read_book, reference_text
    from model_worker.user_text import encode_text, readable

    check_plot(plot)
    text = "\n\n".join([read_book(path) for path in options.text] or [reference_text()])
    plan = Plan(**options.model_dump(include={"history", "question", "rounds", "all_up_to", "seed", "sessions"}))
    with measured_worker(options) as model, progress() as bars:
        ids = encode_text(model.tokenizer, readable(text))
        found = {**about("ttft", options), **FirstTokenRun(model, ids, plan, bars).report()}
    parts = tables_of(first_token_tables(found), cost_line(found))
    show(Shown(found, parts, drawn({"ttft.svg": first_token_figure(found)})), as_json=as_json, plot=plot)
