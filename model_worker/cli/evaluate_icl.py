"""`kvbank eval icl` measures whether a model tells the labels of texts by demonstrations that stand in a memory.

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
from model_worker.settings.base import Count, at_least, described
from model_worker.settings.flags import missing_option, takes


class DemonstrationOptions(MeasuredModel):
    """Options of `kvbank eval icl`."""

    examples: Annotated[
        tuple[Path, ...],
        described('A task: JSON lines {"text": ..., "label": ...}, UTF-8 or .gz; several times. Needed.'),
    ] = ()
    shots: Annotated[
        tuple[Annotated[int, at_least(0, 10_000)], ...],
        described("Demonstrations in the context, drawn once for each seed; several times."),
    ] = (4, 20)
    cached: Annotated[Count, described("Demonstrations of a memory that is drawn anew for each item.")] = 18
    demonstrations: Annotated[int, at_least(1, 1_000_000), described("Demonstrations of the bank.")] = 600
    items: Annotated[int, at_least(2, 1_000_000), described("Texts that are asked for, of each seed.")] = 100
    seeds: Annotated[int, at_least(1, 1000), described("How many seeds, from --seed on.")] = 3


@takes(DemonstrationOptions)
def icl(
    options: DemonstrationOptions,
    out: JournalFile = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also write an SVG: share of labels by demonstrations in the context.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask for labels of texts, with demonstrations in the context and others in a memory, as in MemLong's table.

    The memory has those that are found for the text, among all of a bank or among a few that are drawn anew for each
    text; beside it stand no memory, random demonstrations, and the vote of those that are found, without a model.
    Labels of subjectivity (objective, subjective) are asked for by Input and Type, all others by Review and Sentiment.

    Example: kvbank eval icl --examples mr.jsonl --shots 4 --items 50
    """
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.icl_examples import read_task
    from model_worker.evaluate.icl_report import icl_figure, icl_tables
    from model_worker.evaluate.icl_run import IclRun, Plan
    from model_worker.evaluate.journal import Journal
    from model_worker.evaluate.memory_tables import cost_line

    check_plot(plot)
    check_journal(out)
    if not options.examples:
        raise missing_option("examples", "kvbank eval icl")
    tasks = [read_task(path) for path in options.examples]
    wanted = {"shots", "cached", "demonstrations", "items", "seeds", "seed"}
    plan = Plan(**options.model_dump(include=wanted))
    run = about("icl", options)
    with measured_worker(options) as model, progress() as bars:
        texts = [[(own.text, own.label) for own in task.examples] for task in tasks]
        journal = Journal(out, {**run, "decides": decides(model), "examples": texts})
        found = {**run, **IclRun(model, tasks, plan, journal, bars).report()}
    parts = tables_of(icl_tables(found), cost_line(found))
    show(Shown(found, parts, drawn({"icl.svg": icl_figure(found)})), as_json=as_json, plot=plot)
