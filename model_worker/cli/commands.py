"""Commands of the worker: demo, layers, compressors, and those of sessions."""

import io
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbank.console.output import print_json, printable
from kvbank.console.progress import progress
from kvbank.console.table import Column, print_table, table
from model_worker.cli.option_bounds import LARGEST_COUNT, LARGEST_SEED
from model_worker.cli.places import check_writable
from model_worker.cli.quiet import load_quietly, quiet_libraries

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Model = Annotated[str, typer.Option(help="kvbank-small (shipped), a model folder, or a hub id.")]


def register(app: typer.Typer) -> None:
    """Add the worker's commands to the `kvbank` command line."""
    from model_worker.cli.evaluate import evaluation
    from model_worker.cli.evaluate_icae import add_icae_commands
    from model_worker.cli.homer import homer
    from model_worker.cli.icae import adapters, training
    from model_worker.cli.session import register_session_commands

    app.command("demo")(demo)
    app.command("layers")(layers)
    app.command("compressors")(compressors)
    app.add_typer(homer, name="homer")
    app.add_typer(adapters, name="icae")
    add_icae_commands(evaluation)
    app.add_typer(evaluation, name="eval")
    app.add_typer(training, name="train")
    register_session_commands(app)


def demo(
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text to read; default: the Python reference.")] = None,
    model: Model = "kvbank-small",
    seed: Annotated[int, typer.Option(min=-LARGEST_SEED, max=LARGEST_SEED, help="Other seeds plant other facts.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Folder to keep; default: a temporary one.")] = None,
    capacity: Annotated[int | None, typer.Option(min=40, max=LARGEST_COUNT, help="Chunks that the bank holds.")] = None,
    compressor: Annotated[str, typer.Option(help="How chunks are compressed, e.g. tova:m=48.")] = "none",
    limit: Annotated[
        int | None, typer.Option(min=40_000, max=LARGEST_COUNT, help="Read only so many characters.")
    ] = None,
    as_json: JSON = False,
    svg: Annotated[Path | None, typer.Option(help="Also save the table as a picture.")] = None,
) -> None:
    """Read a long text into a memory service, kill it, and see who still knows what stood in it.

    Example: kvbank demo --limit 40000 --json
    """
    quiet_libraries()
    from model_worker.demo.story import DemoSettings, run_demo

    if svg is not None:
        check_writable(svg)
    settings = DemoSettings(text, model, seed, data, capacity, compressor, limit)
    with progress() as show:
        report = run_demo(settings, show.say, show)
    if svg is not None:
        svg.write_text(_picture(report), encoding="utf-8")
    if as_json:
        print_json(asdict(report))
    else:
        print_table(_MEASURED, _demo_rows(report), title=_demo_title(report), caption=_demo_caption(report))


_MEASURED = (Column("what", "prose"), Column("measured"))


def _demo_title(report: Any) -> str:
    return f"{report.text}, model {report.model}, seed {report.seed}"


def _demo_caption(report: Any) -> str:
    return f"eviction: {report.policy} (bounds 10/90 would always drop the oldest tenth)"


def _picture(report: Any) -> str:
    """The figures as SVG, without rich's fonts, which are on the network."""
    from rich.console import Console

    out = Console(record=True, width=100, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    out.print(printable(_demo_title(report)))
    out.print(table(_MEASURED, _demo_rows(report), 100))
    out.print(_demo_caption(report))
    return re.sub(r"@font-face \{.*?\}\s*", "", out.export_svg(title="kvbank demo"), flags=re.DOTALL)


def _demo_rows(report: Any) -> list[tuple[str, str]]:
    low, high = report.loss_drop_interval
    reasons = ", ".join(f"{n} {reason}" for reason, n in report.evicted_by_reason.items()) or "none"
    return [
        ("tokens read", f"{report.tokens_read:,} in {report.read_seconds:.0f} s"),
        ("chunks written / evicted", f"{report.chunks_written:,} / {report.chunks_evicted:,} ({reasons})"),
        (
            f"K-V bytes per token before / after compression ({report.compressor})",
            f"{report.bytes_per_token_before:,.0f} / {report.bytes_per_token_after:,.0f}",
        ),
        ("retrieval, p50 over the wire", f"{report.retrieval_ms_p50:.1f} ms"),
        ("facts asked for while reading: survived", f"{report.asked_survived} of {report.asked}"),
        ("facts never asked for: survived", f"{report.never_asked_survived} of {report.never_asked}"),
        ("recalled with memory (of the survivors)", _of(report.with_memory)),
        ("recalled without memory", _of(report.without_memory)),
        ("recalled with another text's memory", _of(report.other_memory)),
        ("after kill -9, first worker", _of(report.after_kill)),
        ("after kill -9, second worker", _of(report.second_worker)),
        (f"loss on the rest ({report.rest_tokens:,} tokens), without memory", f"{report.loss_without:.3f} nats"),
        ("the same with memory, same local window", f"{report.loss_with:.3f} nats"),
        (
            f"drop, 95 % interval over {report.loss_blocks} chunks",
            f"{report.loss_drop:.3f} [{low:.3f}, {high:.3f}]",
        ),
    ]


def _of(pair: tuple[int, int]) -> str:
    return f"{pair[0]} of {pair[1]}"


def layers(
    model: Model = "kvbank-small",
    span: Annotated[int, typer.Option(min=16, max=LARGEST_COUNT, help="Tokens of the repeated span.")] = 48,
    trials: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Spans to average over.")] = 8,
    seed: Annotated[int, typer.Option(min=-LARGEST_SEED, max=LARGEST_SEED, help="Other seeds draw other spans.")] = 0,
    as_json: JSON = False,
) -> None:
    """Find the layers of a model that can use a memory: loss drop per injected layer, no training.

    Example: kvbank layers --model ./my-model
    """
    from model_worker.evaluate.layers import measure_layers

    loaded, _ = load_quietly(model)
    with progress() as show:
        baseline, scores = measure_layers(
            loaded,
            span=span,
            trials=trials,
            seed=seed,
            progress=partial(show, "layers"),
        )
    if as_json:
        print_json({"loss_without_memory": baseline, "layers": [asdict(score) for score in scores]})
        return
    best = max((s for s in scores if s.layer is not None), key=lambda s: s.drop_zero)
    advice = f"memory layer for mode memlong: {best.layer} (let it retrieve too)"
    rows = [
        (
            "all" if s.layer is None else str(s.layer),
            s.kind,
            s.capture,
            f"{s.drop_continual:.2f}",
            f"{s.drop_zero:.2f}",
        )
        for s in scores
    ]
    print_table(
        _LAYERS,
        rows,
        title=f"{model}: loss of a repeated span without memory {baseline:.2f} nats",
        caption=advice if best.drop_zero > 0 else "no layer gains from memory at zero positions; try per_layer",
    )


_LAYERS = (
    Column("layer"),
    *(Column(title, "word") for title in ("positions", "keys stored as")),
    *map(Column, ("drop, continual", "drop, zero")),
)


def compressors(as_json: JSON = False) -> None:
    """List the compressors: how to ask for each, what it keeps, its paper and its cost.

    Example: kvbank compressors --json
    """
    from model_worker.compress import REGISTRY, usage

    rows = [{"write": usage(name), "keeps": m.about, "paper": m.paper, "cost": m.cost} for name, m in REGISTRY.items()]
    if as_json:
        print_json(rows)
        return
    # A space, so that lines end between parameters.
    shown = [{**row, "write": row["write"].replace("[,", " [,")} for row in rows]
    columns = [Column(title, "prose") for title in ("write", "keeps", "paper", "cost")]
    print_table(columns, [list(row.values()) for row in shown])
