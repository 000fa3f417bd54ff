"""`kvbank train memlong` trains any model to use its memory, as MemLong does.

The module is light to import: torch comes with the command.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbank.console.progress import progress
from kvbank.console.table import Column
from model_worker.cli.quiet import load_quietly
from model_worker.cli.shown import AsJson, Shown, Table, show
from model_worker.settings.file import as_toml
from model_worker.settings.flags import missing_option, takes
from model_worker.train.memlong.settings import MemlongTraining

if TYPE_CHECKING:
    from model_worker.train.memlong.run import MemlongReport


@takes(MemlongTraining, file=True)
def train_memlong(
    settings: MemlongTraining,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run: model/ or adapter/, checkpoint-N/, training_log.jsonl. [required]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out, exactly.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Train nothing: print the TOML of these settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model to use its memory: documents are read in order, and blocks attend to what left their window.

    What makes the memory's K-V is frozen (the layers up to the memory layer), so that they stay what they were; an
    adapter above it is trained, or the weights themselves (--train full, --new). Chunks are found by --embed, as in
    use, with the text before a block as the query. The result is used by --adapter OUT/adapter, or --model OUT/model.

    Settings may stand in a TOML file, by the names of the options with `_` for `-`; an option decides over the file.

    Example: kvbank train memlong --text novels --held-out dracula.txt.gz --model smollm2 --mode memlong --out run
    --minutes 60
    """
    if print_config:
        show(Shown(settings.model_dump(), as_toml(settings).splitlines()), as_json=as_json)
        return
    if out is None:
        raise missing_option("out", "kvbank train memlong")
    from model_worker.train.memlong.run import train_memlong as train

    with progress() as bars:
        report = train(settings, out, _load, resume=resume, bars=bars)
    show(Shown(asdict(report), [_memories(report)] if report.held_out else [_line(report)]), as_json=as_json)


def _load(model: str, device: str) -> tuple[Any, Any]:
    from model_worker.attachment.loading import device_named

    return load_quietly(model, device=device_named(device))


def _line(report: "MemlongReport") -> str:
    loss = "" if report.loss is None else f", loss {report.loss:.3f} nats a token"
    return (
        f"{report.product}: {report.steps} updates, {report.tokens:,} tokens in {report.seconds:.0f} s, "
        f"{report.trained:.2%} of the weights trained{loss}"
    )


def _memories(report: "MemlongReport") -> Table:
    rows = []
    for row in report.held_out:
        gain, width = row.get("gain"), row.get("width_blocks")
        said = "" if gain is None else f"{gain:+.4f}" + ("" if width is None else f" ± {width:.4f}")
        rows.append((row["memory"], f"{row['nats']:.4f}", said))
    columns = (Column("memory", "word"), Column("nats a token"), Column("gain, 95 %"))
    return Table(columns, rows, _line(report), report.verdict)
