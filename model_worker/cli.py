"""Commands of the worker: demo, layers, compressors, and those of sessions."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Model = Annotated[str, typer.Option(help="kvbank-small (shipped), a model folder, or a hub id.")]


def register(app: typer.Typer) -> None:
    """Add the worker's commands to the `kvbank` command line."""
    from model_worker.eval_cli import evaluation
    from model_worker.homer_cli import homer
    from model_worker.icae_cli import adapters, training
    from model_worker.icae_eval_cli import add_icae_commands
    from model_worker.session_cli import register_session_commands

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
    seed: Annotated[int, typer.Option(help="Other seeds plant other facts.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Folder to keep; default: a temporary one.")] = None,
    capacity: Annotated[int | None, typer.Option(min=40, help="Chunks that the bank holds.")] = None,
    compressor: Annotated[str, typer.Option(help="How chunks are compressed, e.g. tova:m=48.")] = "none",
    limit: Annotated[int | None, typer.Option(min=40_000, help="Read only so many characters.")] = None,
    as_json: JSON = False,
    svg: Annotated[Path | None, typer.Option(help="Also save the table as a picture.")] = None,
) -> None:
    """Read a long text into a memory service, kill it, and see who still knows what stood in it."""
    _quiet()
    from model_worker.demo import DemoSettings, run_demo

    console = Console(stderr=True)
    settings = DemoSettings(text, model, seed, data, capacity, compressor, limit)
    with _bar(console) as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        report = run_demo(settings, lambda line: bar.console.print(line, highlight=False), progress)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
        return
    out = Console(record=svg is not None, width=100 if svg else None)
    out.print(demo_table(report))
    if svg is not None:
        picture = out.export_svg(title="kvbank demo")
        svg.write_text(
            re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
        )  # rich's fonts are on the network


def demo_table(report: Any) -> Table:
    """The demo's figures as one table."""
    table = Table(title=f"{report.text}, model {report.model}, seed {report.seed}", title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    low, high = report.loss_drop_interval
    reasons = ", ".join(f"{n} {reason}" for reason, n in report.evicted_by_reason.items()) or "none"
    rows = [
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
    for row in rows:
        table.add_row(*row)
    table.caption = f"eviction: {report.policy} (bounds 10/90 would always drop the oldest tenth)"
    return table


def _of(pair: tuple[int, int]) -> str:
    return f"{pair[0]} of {pair[1]}"


def layers(
    model: Model = "kvbank-small",
    span: Annotated[int, typer.Option(min=16, help="Tokens of the repeated span.")] = 48,
    trials: Annotated[int, typer.Option(min=1, help="Spans to average over.")] = 8,
    seed: Annotated[int, typer.Option(help="Other seeds draw other spans.")] = 0,
    as_json: JSON = False,
) -> None:
    """Find the layers of a model that can use a memory: loss drop per injected layer, no training."""
    _quiet()
    from model_worker.layers import measure_layers
    from model_worker.loading import load_model

    loaded, _ = load_model(model)
    with _bar(Console(stderr=True)) as bar:
        task = bar.add_task("layers", total=None)
        baseline, scores = measure_layers(
            loaded,
            span=span,
            trials=trials,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print(json.dumps({"loss_without_memory": baseline, "layers": [asdict(score) for score in scores]}, indent=2))
        return
    table = Table(title=f"{model}: loss of a repeated span without memory {baseline:.2f} nats", title_justify="left")
    for column in ("layer", "positions", "keys stored as", "drop, continual", "drop, zero"):
        table.add_column(column, justify="left" if column in ("positions", "keys stored as") else "right")
    best = max((s for s in scores if s.layer is not None), key=lambda s: s.drop_zero)
    for s in scores:
        name = "all" if s.layer is None else str(s.layer)
        style = "bold" if s is best else ""
        table.add_row(name, s.kind, s.capture, f"{s.drop_continual:.2f}", f"{s.drop_zero:.2f}", style=style)
    advice = f"memory layer for mode memlong: {best.layer} (let it retrieve too)"
    table.caption = advice if best.drop_zero > 0 else "no layer gains from memory at zero positions; try per_layer"
    Console().print(table)


def compressors(as_json: JSON = False) -> None:
    """List the compressors: how to ask for each, what it keeps, its paper and its cost."""
    _quiet()
    from model_worker.compress import REGISTRY, usage

    rows = [{"write": usage(name), "keeps": m.about, "paper": m.paper, "cost": m.cost} for name, m in REGISTRY.items()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    # A space, so that lines end between parameters.
    shown = [{**row, "write": row["write"].replace("[,", " [,")} for row in rows]
    table = Table()
    table.add_column("write", width=max(len(word) for row in shown for word in row["write"].split()))
    for column in ("keeps", "paper", "cost"):
        table.add_column(column)
    for row in shown:
        table.add_row(*(escape(text) for text in row.values()))
    Console().print(table)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def _quiet() -> None:
    """transformers speaks up at load time about things that are meant to be so."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
