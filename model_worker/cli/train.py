"""`kvbank train icae` trains an in-context autoencoder for any model; `memlong` stands in train_memlong.py.

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
from model_worker.cli.train_memlong import train_memlong
from model_worker.settings.file import as_toml
from model_worker.settings.flags import missing_option, takes
from model_worker.train.adapter_settings import AdapterTraining

if TYPE_CHECKING:
    from model_worker.train.icae_trainer import TrainReport

training = typer.Typer(no_args_is_help=True, help="Train models to use a memory, and adapters that compress.")
training.command("memlong")(train_memlong)


@training.command("icae")
@takes(AdapterTraining, file=True)
def train_icae(
    settings: AdapterTraining,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run: adapter/, checkpoint-N/, training_log.jsonl. [required]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out, exactly.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Train nothing: print the TOML of these settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train an ICAE adapter: LoRA and memory tokens that turn a text into a few slots which the frozen model reads.

    First pretrain on plain text (restore the text from its slots, and continue it), then, if questions are to be
    answered from slots, finetune with --adapter on instructions. Losses are in nats a token and logged apart: ae_loss
    (restoration) should fall towards 0, lm_loss (continuation) cannot. A plateau near 2 is normal; a higher rate helps
    to leave it. Only the adapter is written, never the base. It is bound to the values of the base's weights:
    loaded in another dtype, which rounds them, the base is another one.

    Settings may stand in a TOML file, by the names of the options with `_` for `-`; an option decides over the file.

    Example: kvbank train icae --data book.txt --out run --slots 16 --rank 64 --targets all-linear --positions spread
    --lr 2e-3 --minutes 30
    """
    if print_config:
        show(Shown(settings.model_dump(), as_toml(settings).splitlines()), as_json=as_json)
        return
    if out is None:
        raise missing_option("out", "kvbank train icae")
    from model_worker.train.adapter import train_adapter

    with progress() as bars:
        report = train_adapter(settings, out, _load, resume=resume, bars=bars)
    show(Shown(asdict(report), [_losses(report)]), as_json=as_json)


def _load(model: str, device: str) -> tuple[Any, Any]:
    from model_worker.attachment.loading import device_named

    return load_quietly(model, device=device_named(device))


def _losses(report: "TrainReport") -> Table:
    rows = []
    for name in sorted({*report.losses, *report.evaluation}):
        values = (part.get(name) for part in (report.losses, report.evaluation))
        rows.append((name, *("" if value is None else f"{value:.3f}" for value in values)))
    columns = (Column("nats a token", "word"), Column("training, last"), Column("held back"))
    title = f"{report.steps} updates in {report.seconds:.0f} s"
    return Table(columns, rows, title, f"adapter: {report.adapter}")
