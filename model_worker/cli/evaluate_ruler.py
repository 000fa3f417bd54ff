"""`kvbank eval ruler` measures RULER's string-matched tasks by length: plain, by re-reading, and by recalled K-V.

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
from model_worker.settings.base import Count, CountOrZero, described
from model_worker.settings.flags import takes

# Options that say which prompts are wanted: another run goes on from the answers to those that it wants too.
_WHICH = ("tokens", "task", "prompts")


class RulerOptions(MeasuredModel):
    """Options of `kvbank eval ruler`."""

    text: Annotated[
        tuple[Path, ...], described("Filler: a UTF-8 text or .gz, several times. Default: the Python reference.")
    ] = ()
    tokens: Annotated[tuple[TextTokens, ...], described("Tokens of a prompt, its answer included; several times.")] = (
        4096,
        8192,
    )
    task: Annotated[
        tuple[str, ...],
        described(
            "single, multi-key, multi-value, multi-query, variables, common-words or frequent-words; several times. "
            "Default: all."
        ),
    ] = ()
    prompts: Annotated[Count, described("Prompts of each task at each length.")] = 5
    way: Annotated[tuple[str, ...], described("plain, re-reading, memory or nothing; several times.")] = (
        "plain",
        "re-reading",
        "memory",
    )
    local: Annotated[
        CountOrZero, described("Last tokens of the text that stand in the window before the question.")
    ] = 0
    stream: Annotated[
        bool, described("Ask in the stream that read the text, whose first tokens stay, rather than in a new one.")
    ] = False


@takes(RulerOptions)
def ruler(
    options: RulerOptions,
    out: JournalFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: share of strings by tokens.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask for what stands in long texts by RULER's tasks, and count the expected strings that the answers hold.

    A prompt is made for each number, task and length, and read into a bank of its own. Its question is searched for
    once: `memory` attends to the K-V of the hits, `re-reading` has the plain model read their tokens before the
    question, `plain` the whole text, where the model was trained for so many tokens. `found` says how much of what is
    expected stands in the hits. Each prompt's answers are noted in the file of --log as they come, and are taken from
    there by a run of more prompts, tasks or lengths.

    Example: kvbank eval ruler --model smollm2 --tokens 4096 --task single --task variables --prompts 3
    """
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.journal import Journal
    from model_worker.evaluate.memory_tables import cost_line
    from model_worker.evaluate.ruler.report import ruler_figure, ruler_tables
    from model_worker.evaluate.ruler.run import Plan, RulerRun
    from model_worker.evaluate.ruler.tasks import TASKS
    from model_worker.text_files import read_book, reference_text

    check_plot(plot)
    check_journal(out)
    text = "\n\n".join([read_book(path) for path in options.text] or [reference_text()])
    plan = Plan(
        tasks=options.task or tuple(TASKS),
        ways=options.way,
        **options.model_dump(include={"tokens", "prompts", "local", "stream", "seed"}),
    )
    run = about("ruler", options)
    with measured_worker(options) as model, progress() as bars:
        decided = {name: value for name, value in run["options"].items() if name not in _WHICH}
        journal = Journal(out, {"options": decided, "decides": decides(model), "text": text})
        found = {**run, **RulerRun(model, text, plan, journal, bars).report()}
    parts = tables_of(ruler_tables(found), cost_line(found))
    show(Shown(found, parts, drawn({"ruler.svg": ruler_figure(found)})), as_json=as_json, plot=plot)
