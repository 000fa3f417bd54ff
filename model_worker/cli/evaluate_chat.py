"""`kvbank eval chat` measures how many facts a model tells that were told to it many turns ago.

The module is light to import: torch comes with the command.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvbank.console.progress import progress
from model_worker.cli.measured_model import MeasuredModel
from model_worker.cli.measuring import (
    JournalFile,
    about,
    attached,
    check_journal,
    decides,
    load_measured,
    measured_service,
)
from model_worker.cli.places import check_plot
from model_worker.cli.shown import AsJson, Shown, show, tables_of
from model_worker.settings.base import Count, at_least, described
from model_worker.settings.flags import takes

if TYPE_CHECKING:
    from model_worker.evaluate.service_process import ServiceProcess


class ConversationOptions(MeasuredModel):
    """Options of `kvbank eval chat`."""

    text: Annotated[
        tuple[Path, ...],
        described("Sentences of other text, a turn each: UTF-8 or .gz, several. Default: the Python reference."),
    ] = ()
    embed: Annotated[
        str, described("How chunks are found: lexical, lexical:idf, minilm, hybrid:A+B, a folder, or a hub id.")
    ] = "lexical:idf"
    turns: Annotated[
        tuple[Annotated[int, at_least(1, 100_000)], ...],
        described("Turns of other text after which all facts are asked for, several times."),
    ] = (50, 100, 200, 400)
    facts: Annotated[int, at_least(1, 10_000), described("Facts of each wording, told in the first turns.")] = 10
    wording: Annotated[
        tuple[str, ...],
        described("number, colour, ... (an unknown one names all), or trained, or held-out; several times."),
    ] = ("number",)
    ask: Annotated[
        Literal["auto", "complete", "chat"],
        described("complete: the model completes the statement; chat: a question; auto: as its chat template allows."),
    ] = "auto"
    answer: Annotated[Count, described("Tokens of the longest answer, in every turn.")] = 16
    conversations: Annotated[
        int, at_least(1, 1000), described("How many conversations, with the seeds from --seed on.")
    ] = 1
    restart: Annotated[bool, described("Kill and start the service, and ask from a new process, at each place.")] = (
        False
    )


@takes(ConversationOptions)
def measured_chat(
    options: ConversationOptions,
    out: JournalFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: share of facts by turns.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell a model facts in the first turns of a conversation, say other things, and ask for the facts.

    All goes the way of `kvbank chat`, through sessions. `told` asks the session itself; `whole context` has the
    conversation in the model's own window, where it was trained for that; `no memory` has the same window and recalls
    nothing. `whole` counts statements that stand whole in a chunk, `found` those whose chunk is found by the question,
    `empty window` facts that are told where the question stands alone.

    Example: kvbank eval chat --turns 100 --conversations 3 --restart
    """
    from model_worker.evaluate.asking import chat_is_possible
    from model_worker.evaluate.chat_plan import Plan, sentences_of
    from model_worker.evaluate.chat_report import chat_figure, chat_tables
    from model_worker.evaluate.chat_run import ChatRun
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.journal import Journal
    from model_worker.evaluate.memory_tables import cost_line
    from model_worker.session.preset import SessionPreset
    from model_worker.text_files import read_text, reference_text

    check_plot(plot)
    check_journal(out)
    text = "\n\n".join([read_text(path) for path in options.text] or [reference_text()])
    sentences = sentences_of(text)
    loaded = load_measured(options)
    form = options.ask if options.ask != "auto" else "chat" if chat_is_possible(loaded[1]) else "complete"
    wanted = {"turns", "facts", "wording", "answer", "conversations", "seed"}
    plan = Plan(ask=form, **options.model_dump(include=wanted))
    run = about("chat", options)
    with measured_service() as service, attached(loaded, options, service.address) as model, progress() as bars:

        def elsewhere(name: str, questions: Sequence[str]) -> int:
            return _asked_again(service, options, name, questions)

        preset = SessionPreset.of(model.model, model.chunk, window=options.window, recent=options.recent)
        journal = Journal(out, {**run, "decides": decides(model), "preset": asdict(preset), "text": text})
        asked = ChatRun(model, sentences, plan, preset, journal, bars, elsewhere if options.restart else None)
        found = {**run, **asked.report()}
    parts = tables_of(chat_tables(found), cost_line(found))
    show(Shown(found, parts, drawn({"chat.svg": chat_figure(found)})), as_json=as_json, plot=plot)


def _asked_again(service: "ServiceProcess", options: ConversationOptions, name: str, questions: Sequence[str]) -> int:
    """Kill the service, start it again, and ask questions from a new process; return the tokens that were fed there."""
    from model_worker.cli.asking_process import Asking, ask_in_process

    service.kill()
    service.start()
    own = {field: getattr(options, field) for field in MeasuredModel.model_fields}
    return ask_in_process(
        Asking(
            options=MeasuredModel(**own),
            address=service.address,
            name=name,
            questions=tuple(questions),
            answer=options.answer,
        )
    )
