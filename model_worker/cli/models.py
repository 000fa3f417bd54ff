"""`kvbank layers` and `kvbank compressors` say what a model can do with a memory, and how chunks can be compressed."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from kvbank.console.progress import progress
from kvbank.console.table import Column
from model_worker.attachment.model_names import SHIPPED
from model_worker.cli.quiet import load_quietly
from model_worker.cli.shown import AsJson, Shown, Table, show
from model_worker.settings.base import LARGEST_COUNT, LARGEST_SEED

if TYPE_CHECKING:
    from model_worker.evaluate.layers import LayersReport


def layers(
    model: Annotated[str, typer.Option(help="kvbank-small (shipped), smollm2, a model folder, or a hub id.")] = SHIPPED,
    span: Annotated[int, typer.Option(min=16, max=LARGEST_COUNT, help="Tokens of the repeated span.")] = 48,
    trials: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Spans to average over.")] = 8,
    seed: Annotated[int, typer.Option(min=-LARGEST_SEED, max=LARGEST_SEED, help="Other seeds draw other spans.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find the layers of a model that can use a memory: loss drop per injected layer, no training.

    Example: kvbank layers --model ./my-model
    """
    from model_worker.evaluate.layers import measure_layers

    loaded, _ = load_quietly(model)
    with progress() as bars:
        report = measure_layers(loaded, span=span, trials=trials, seed=seed, progress=partial(bars, "layers"))
    show(_shown(model, report), as_json=as_json)


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


def compressors(as_json: AsJson = False) -> None:
    """List the compressors, with how to ask for each, what it keeps, its paper and its cost.

    Example: kvbank compressors --json
    """
    from model_worker.compress import REGISTRY, usage

    rows = [{"write": usage(name), "keeps": m.about, "paper": m.paper, "cost": m.cost} for name, m in REGISTRY.items()]
    # A space, so that lines end between parameters.
    cells = [[row["write"].replace("[,", " [,"), row["keeps"], row["paper"], row["cost"]] for row in rows]
    columns = [Column(title, "prose") for title in ("write", "keeps", "paper", "cost")]
    show(Shown(rows, [Table(columns, cells)]), as_json=as_json)
