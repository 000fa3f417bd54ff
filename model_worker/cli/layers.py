"""`kvbank layers` finds the layers of a model that can use a memory, and chooses the few that keep its recall.

The module is light to import: torch comes with the measurements.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field

from kvbank.console.progress import progress
from kvbank.console.table import Column
from model_worker.attachment.model_names import SHIPPED
from model_worker.cli.measuring import LogFile, check_journal, command_of, last_name
from model_worker.cli.places import check_plot, check_writable
from model_worker.cli.quiet import load_quietly
from model_worker.cli.shown import AsJson, Shown, Table, show, tables_of
from model_worker.errors import InputError
from model_worker.settings.base import Count, CountOrZero, ModelName, Seed, at_least, described
from model_worker.settings.flags import takes
from model_worker.settings.model_run import RunsOn

if TYPE_CHECKING:
    from model_worker.attachment.attachment import Attachment
    from model_worker.evaluate.choosing_layers import ChoicePlan
    from model_worker.evaluate.layers import LayersReport

_CHOICE, _FACTS = "With --choose", "With --choose: the facts"
# Entries of the document that the file has elsewhere, or that would make it large.
_NOT_IN_THE_FILE = ("evaluation", "model", "mode", "frontier", "tried")


class LayersOptions(RunsOn):
    """Options of `kvbank layers`."""

    model: ModelName = SHIPPED
    seed: Annotated[Seed, described("Other seeds draw other spans, and plant other facts.")] = 0
    span: Annotated[int, at_least(16), described("Tokens of the repeated span.")] = 48
    trials: Annotated[Count, described("Spans to average over.")] = 8
    choose: Annotated[bool, described("Choose the smallest set of layers that keeps the recall of all.")] = False
    keep: Annotated[
        float, Field(gt=0, le=1), described("Share of the recall of all layers that is to be kept.", panel=_CHOICE)
    ] = 0.95
    minutes: Annotated[float | None, Field(ge=0), described("End the search after so many minutes.", panel=_CHOICE)] = (
        None
    )
    mode: Annotated[Literal["memlong", "per_layer"] | None, described("By default the model's own.", panel=_CHOICE)] = (
        None
    )
    positions: Annotated[str | None, described("Where memory stands, as in attach.", panel=_CHOICE)] = None
    text: Annotated[
        tuple[Path, ...],
        described("Text around the facts, UTF-8 or .gz, several times. Default: Python reference.", panel=_FACTS),
    ] = ()
    facts: Annotated[int, at_least(2), described("Facts that guide the search.", panel=_FACTS)] = 16
    fresh: Annotated[
        int, at_least(2), described("Facts to choose by, and again as many to confirm with.", panel=_FACTS)
    ] = 48
    chunk: Annotated[Count | None, described("Tokens of a chunk; by default the model's.", panel=_FACTS)] = None
    hits: Annotated[
        Count | None, described("Chunks recalled for each question; by default the model's top_k.", panel=_FACTS)
    ] = None
    context: Annotated[
        Literal["isolated", "window"] | None, described("How chunks are stored; by default as usual.", panel=_FACTS)
    ] = None
    local: Annotated[
        CountOrZero, described("Tokens of text before half of the questions; 0 for none.", panel=_FACTS)
    ] = 64
    wording: Annotated[
        tuple[str, ...], described("number, code, room or town, several times; by default all.", panel=_FACTS)
    ] = ()


@takes(LayersOptions)
def layers(
    options: LayersOptions,
    out: Annotated[
        Path | None, typer.Option(help="With --choose: write the file for attach(layers=FILE) there.")
    ] = None,
    log: LogFile = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --choose: also write an SVG: recall by number of layers.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the layers of a model that can use a memory: loss drop per injected layer, no training.

    With --choose: find the smallest set of layers that keeps --keep of the recall of all, with the bytes that a token
    takes. Facts are planted in a text and asked for, with the K-V of a set of layers alone; layers are taken away one
    by one, guided by the log-probability of the answers. Facts that the search did not see decide, and others confirm.

    Example: kvbank layers --model ./my-model --choose --out layers.json
    """
    if not options.choose:
        if out is not None or plot is not None or log is not None:
            raise InputError("--out, --log and --plot belong to --choose")
        _measure(options, as_json)
        return
    check_plot(plot)
    check_journal(log)
    if out is not None:
        check_writable(out)
    _choose(options, out, log, plot, as_json)


def _measure(options: LayersOptions, as_json: bool) -> None:
    """Measure each layer alone, and show it."""
    from model_worker.evaluate.layers import measure_layers

    loaded, _ = load_quietly(options.model, **options.loading())
    wanted = options.model_dump(include={"span", "trials", "seed"})
    with progress() as bars:
        report = measure_layers(loaded, **wanted, progress=partial(bars, "layers"))
    show(_shown(options.model, report), as_json=as_json)


def _shown(model: str, report: "LayersReport") -> Shown:
    best = report.best
    advice = f"memory layer for mode memlong: {best.layer} (let it retrieve too)"
    titles = (Column("layer"), Column("positions", "word"), Column("keys stored as", "word"))
    rows = [
        (
            "all" if score.layer is None else str(score.layer),
            score.kind,
            score.capture,
            f"{score.drop_continual:.2f}",
            f"{score.drop_zero:.2f}",
        )
        for score in report.layers
    ]
    made = Table(
        (*titles, Column("drop, continual"), Column("drop, zero")),
        rows,
        f"{model}: loss of a repeated span without memory {report.loss_without_memory:.2f} nats",
        advice if best.drop_zero > 0 else "no layer gains from memory at zero positions; try per_layer",
    )
    return Shown(asdict(report), [made])


# -- choosing ---------------------------------------------------------------------------------------------------------


def _choose(options: LayersOptions, out: Path | None, log: Path | None, plot: Path | None, as_json: bool) -> None:
    """Choose layers, write the file of the choice where one is wanted, and show what was found."""
    from model_worker.evaluate.choosing_layers import choose_layers
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.journal import Journal
    from model_worker.evaluate.layer_figures import layers_figure
    from model_worker.evaluate.layer_tables import layer_lines, layer_tables
    from model_worker.text_files import read_book, reference_text

    text = "\n\n".join([read_book(path) for path in options.text] or [reference_text()])
    with _attached(options) as attachment, progress() as bars:
        plan = _plan(options, attachment)
        run = {"plan": asdict(plan) | {"minutes": None, "keep": None}, "attached": asdict(attachment.plan)}
        journal = Journal(log, {**run, "reader": attachment.reader.digest, "text": text})
        chosen = choose_layers(attachment, text, plan, journal=journal, progress=bars)
        found = {**_about(options, attachment, plan), **chosen.document()}
        if out is not None:
            _choice(found, attachment).write(out)
    lines = [*layer_lines(found), *([] if out is None else [f"written to {out}, for attach(layers=FILE)"])]
    shown = Shown(found, tables_of(layer_tables(found), *lines), drawn({"layers.svg": layers_figure(found)}))
    show(shown, as_json=as_json, plot=plot)


@contextmanager
def _attached(options: LayersOptions) -> "Iterator[Attachment]":
    """Load the model, attach it in all layers of its mode, and leave it as it was at the end.

    In mode per_layer these are all layers of the model, whatever fewer its own settings name.
    """
    from model_worker.attaching import attach

    loaded, tokenizer = load_quietly(options.model, **options.loading())
    attachment = attach(loaded, tokenizer, mode=options.mode, positions=options.positions)
    every = tuple(range(len(attachment.reports)))
    if attachment.plan.mode == "per_layer" and attachment.plan.retrieval_layers != every:
        attachment.detach()
        positions = attachment.plan.positions
        attachment = attach(loaded, tokenizer, mode="per_layer", positions=positions, retrieval_layers=every)
    try:
        yield attachment
    finally:
        attachment.detach()


def _plan(options: LayersOptions, attachment: "Attachment") -> "ChoicePlan":
    """Return how layers are chosen; what the options leave open is as a `MemoryModel` has it."""
    from model_worker.evaluate.choosing_layers import ChoicePlan
    from model_worker.evaluate.planted import WORDINGS, Planting
    from model_worker.model_settings import ModelSettings

    asked = {"chunk": options.chunk, "top_k": options.hits, "context": options.context}
    settings = ModelSettings.of(None, asked, getattr(attachment.model.config, "kvbank", None) or {})
    assert settings.chunk is not None
    assert settings.top_k is not None
    return ChoicePlan(
        planting=Planting(settings.chunk, options.local, options.wording or tuple(WORDINGS)),
        context=settings.context or ("isolated" if attachment.plan.mode == "memlong" else "window"),
        hits=settings.top_k,
        **options.model_dump(include={"keep", "facts", "fresh", "minutes", "seed"}),
    )


def _about(options: LayersOptions, attachment: "Attachment", plan: "ChoicePlan") -> dict[str, Any]:
    """Return what the document says of the run."""
    return {
        "evaluation": "layers",
        "command": command_of("layers", options, group=()),
        "model": last_name(options.model),
        "mode": attachment.plan.mode,
        "positions": attachment.plan.positions,
        "text": [path.name for path in options.text] or ["Python reference"],
        "date": datetime.now(UTC).date().isoformat(),
        "seed": plan.seed,
        "chunk": plan.planting.chunk,
        "context": plan.context,
        "hits": plan.hits,
        "local": plan.planting.local,
        "wordings": list(plan.planting.wordings),
        "facts": plan.facts,
        "fresh": plan.fresh,
    }


def _choice(found: dict[str, Any], attachment: "Attachment") -> Any:
    """Return the content of the file: the layers, and what was measured without the sets on the way."""
    from model_worker.attachment.layer_choice import LayerChoice, named_parts
    from model_worker.evaluate.recall_by_layers import with_layers

    plan = with_layers(attachment.plan, found["chosen"]["layers"])
    return LayerChoice(
        model=found["model"],
        reader_parts=named_parts(attachment.reader),
        mode="memlong" if plan.mode == "memlong" else "per_layer",
        memory_layers=plan.memory_layers,
        retrieval_layers=plan.retrieval_layers,
        measured={key: value for key, value in found.items() if key not in _NOT_IN_THE_FILE},
    )
