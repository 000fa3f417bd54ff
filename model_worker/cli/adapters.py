"""`kvbank icae import` makes an adapter of the ICAE authors' checkpoint.

The module is light to import: torch comes with the command.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from model_worker.cli.quiet import load_quietly
from model_worker.cli.shown import AsJson, Shown, show
from model_worker.errors import InputError
from model_worker.settings.base import LARGEST_COUNT

adapters = typer.Typer(no_args_is_help=True, help="In-context autoencoders: import adapters that others trained.")


@adapters.callback()
def _group() -> None:
    """Keep the name of the group, which typer would drop where it has one command."""


@adapters.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' v2 checkpoint: one safetensors file.")],
    out: Annotated[Path, typer.Argument(help="Folder of the adapter; new, or empty.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model it was trained for (mistralai/Mistral-7B-Instruct-v0.2 for the authors' own). The adapter "
            "is loaded on it and bound to it. Without: taken on trust, and any model that it fits is accepted later."
        ),
    ] = None,
    rate: Annotated[
        int, typer.Option(min=1, max=LARGEST_COUNT, help="Tokens a slot, which the file does not say.")
    ] = 4,
    alpha: Annotated[float, typer.Option(help="Alpha of LoRA, which the file does not say either.")] = 32.0,
    prefix_ids: Annotated[
        str,
        typer.Option(help="Ids in front of the slots when a question is answered; the authors': 1,733,16289,28793."),
    ] = "",
    suffix_ids: Annotated[str, typer.Option(help="Ids behind the question; the authors': 733,28748,16289,28793.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make an adapter of an official ICAE v2 checkpoint: the folder that `icae:adapter=DIR` and --adapter take.

    LoRA and memory tokens are kept, copies of the base are left out. The names in the file were taken from the authors'
    code; no released file was at hand.

    Example: kvbank icae import icae_v2.safetensors adapter --model mistralai/Mistral-7B-Instruct-v0.2
    """
    from model_worker.icae.official import import_official

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: give a new folder")
    ids = {"prefix_ids": _ids("prefix-ids", prefix_ids), "suffix_ids": _ids("suffix-ids", suffix_ids)}
    base = None if model is None else load_quietly(model, device="cpu")[0]
    name = "" if model is None or Path(model).exists() else model
    try:
        config = import_official(checkpoint, out, rate=rate, alpha=alpha, base=base, name=name, **ids)
        digest = "" if base is None else _bound(base, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from None
    bound = f"bound to {model}, digest {digest}" if model else "bound to no model: --model would try and bind it"
    line = f"{out}: {config.slots} slots of {config.rate} tokens, {bound}"
    show(Shown({"adapter": str(out), "digest": digest, **asdict(config)}, [line]), as_json=as_json)


def _bound(base: Any, folder: Path) -> str:
    """Load an adapter, write it again with its digest, and return that; remove an adapter that does not fit."""
    from model_worker.icae.model import Icae

    try:
        icae = Icae.from_pretrained(base, folder)
    except InputError:
        shutil.rmtree(folder.resolve())
        raise
    icae.save_pretrained(folder)
    return icae.digest


def _ids(option: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise InputError(f"--{option} takes token ids between commas, not {text!r}")
    return tuple(int(word) for word in words)
