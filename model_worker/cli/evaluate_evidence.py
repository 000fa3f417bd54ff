"""`kvbank eval evidence` measures whether the passage that answers a question is found, by embedder.

The module is light to import: torch comes with the encoders.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvbank.console.progress import progress
from model_worker.cli.measuring import command_of
from model_worker.cli.places import check_plot
from model_worker.cli.quiet import quiet_libraries
from model_worker.cli.shown import AsJson, Shown, show, tables_of
from model_worker.errors import InputError
from model_worker.settings.base import Count, Seed, Settings, at_least, described
from model_worker.settings.flags import missing_option, takes

if TYPE_CHECKING:
    from model_worker.evaluate.evidence.collection import Collection


# What only some sets go by, and which do.
_OWN = {
    **dict.fromkeys(("text", "passages", "letters", "half", "seed"), ("statements",)),
    **dict.fromkeys(("data", "limit"), ("qmsum", "memorybank")),
}


class EvidenceOptions(Settings):
    """Options of `kvbank eval evidence`."""

    embed: Annotated[
        tuple[str, ...],
        described("lexical, lexical:idf, hybrid:A+B,w=W, an encoder's name, folder or hub id; several times."),
    ] = ("lexical", "lexical:idf")
    set: Annotated[
        Literal["statements", "qmsum", "memorybank"], described("What is searched; the last two need --data.")
    ] = "statements"
    data: Annotated[Path | None, described("Folder of the data set.")] = None
    text: Annotated[
        tuple[Path, ...],
        described("statements: a UTF-8 text or .gz to plant in, several times. Default: Python reference."),
    ] = ()
    passages: Annotated[Count, described("statements: how many passages to plant in.")] = 2000
    letters: Annotated[int, at_least(20), described("statements: letters of a passage; 250 are about 64 tokens.")] = 250
    half: Annotated[
        Literal["all", "even", "odd"], described("statements: which are asked for, to choose on one half.")
    ] = "all"
    limit: Annotated[Count | None, described("qmsum, memorybank: only the first N meetings or users.")] = None
    k: Annotated[tuple[Count, ...], described("Passages that are looked at, several times.")] = (1, 2, 4, 8, 16)
    seed: Annotated[Seed, described("statements: other seeds plant them in other places.")] = 0


@takes(EvidenceOptions)
def evidence(
    options: EvidenceOptions,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: recall by k.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure recall at k of the passage that answers a question, for each embedder; BM25 and chance beside them.

    statements: 60 of our own, planted among passages of other texts, each asked for in its words and in others.

    qmsum: turns of meetings; the evidence of a question is the span of turns that the data set names.

    memorybank: turns of chats; the turns that answer a probing question are by our own reading, since none are named.

    A question counts as found when one of its passages is among the best k. squality has no evidence, and is not here.

    Example: kvbank eval evidence --embed lexical:idf --embed minilm --embed hybrid:lexical:idf+minilm
    """
    from model_worker.embed import embedder
    from model_worker.evaluate.evidence.recall import measure_recall
    from model_worker.evaluate.evidence.report import cost_lines, document, recall_figure, recall_tables
    from model_worker.evaluate.figures import drawn

    check_plot(plot)
    _check_set(options)
    collections = _collections(options)
    quiet_libraries()
    embedders = {name: embedder(name) for name in options.embed}
    with progress() as bars:
        measured = measure_recall(collections, embedders, sorted(set(options.k)), bars)
    run = {"evaluation": "evidence", "command": command_of("evidence", options), "set": options.set}
    found = {**run, "seed": options.seed, **document(collections, measured)}
    figure = recall_figure(f"{options.set}: evidence among the best k", found)
    parts = tables_of(recall_tables(found), *cost_lines(found))
    show(Shown(found, parts, drawn({"evidence.svg": figure})), as_json=as_json, plot=plot)


def _check_set(options: EvidenceOptions) -> None:
    """Refuse an option that was given, and that the set would not go by. Raises InputError."""
    for name, sets in _OWN.items():
        if name in options.model_fields_set and options.set not in sets:
            raise InputError(f"--{name} is an option of {' and '.join(sets)}, and not of {options.set}")


def _collections(options: EvidenceOptions) -> "list[Collection]":
    from model_worker.evaluate.evidence.memorybank import chats
    from model_worker.evaluate.evidence.qmsum import meetings
    from model_worker.evaluate.evidence.statements import planted
    from model_worker.text_files import passages, read_book, reference_text

    if options.set == "statements":
        texts = [read_book(path) for path in options.text] or [reference_text()]
        cut = [passage for text in texts for passage in passages(text, options.letters)]
        return planted(cut, options.passages, half=options.half, seed=options.seed)
    if options.data is None:
        raise missing_option("data", "kvbank eval evidence")
    if not options.data.is_dir():
        raise InputError(f"{options.data} is no folder")
    found = meetings(options.data) if options.set == "qmsum" else chats(options.data)
    return found[: options.limit]
