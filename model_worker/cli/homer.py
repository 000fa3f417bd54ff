"""`kvbank homer calibrate` measures the bias table of a model for HOMER.

The module is light to import: torch comes with the command.
"""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from kvbank.console.progress import progress
from model_worker.attachment.model_names import SHIPPED
from model_worker.cli.quiet import load_quietly
from model_worker.cli.shown import AsJson, Shown, show
from model_worker.errors import InputError
from model_worker.settings.base import ModelName, Rope, Settings, at_least, described
from model_worker.settings.flags import takes
from model_worker.text_files import read_text, reference_text

if TYPE_CHECKING:
    from model_worker.homer.calibrate import Calibration

homer = typer.Typer(no_args_is_help=True, help="Hierarchical context merging: calibrate it for a model.")


@homer.callback()
def _group() -> None:
    """Keep the name of the group, which typer would drop where it has one command."""


class CalibrateOptions(Settings):
    """Options of `kvbank homer calibrate` that say what is measured."""

    model: ModelName = SHIPPED
    rope: Rope = None
    text: Annotated[Path | None, described("A UTF-8 text to measure; default: the Python reference.")] = None
    segments: Annotated[int, at_least(2), described("At most so many pieces of the text.")] = 100
    distances: Annotated[
        int | None, at_least(16), described("Distances measured; default: half of the trained length.")
    ] = None
    enough: Annotated[float, Field(ge=0), described("Stop at this share of error to spread.")] = 0.05


@homer.command()
@takes(CalibrateOptions)
def calibrate(
    options: CalibrateOptions,
    out: Annotated[Path | None, typer.Option(help="File to write; default: where bias=auto looks.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the bias table of a model (and rope scaling), so that near and far tokens are compared fairly.

    Example: kvbank homer calibrate --model ./my-model --rope yarn:4
    """
    from model_worker.attaching import attach
    from model_worker.homer.bias import bias_key, save_bias
    from model_worker.homer.calibrate import calibrate as measure
    from model_worker.user_text import encode_text, readable

    words = read_text(options.text) if options.text else reference_text()
    if out is not None:
        _check_out(out)
    loaded, tokenizer = load_quietly(options.model, rope=options.rope)
    ids = encode_text(tokenizer, readable(words))
    attachment = attach(loaded, tokenizer)
    limits = options.model_dump(include={"distances", "segments", "enough"})
    with progress() as bars:
        found = measure(attachment, ids, **limits, progress=partial(bars, "segments"))
    about = _about(options, found)
    path = save_bias(attachment, found.table, about, out)
    lines = [
        f"{about['segments']} segments, {about['distances']} distances, standard error {found.error:.3f} of the spread",
        f"written to {path}" + ("" if out else "; compressors with bias=auto use it for this model"),
    ]
    show(Shown({**about, "model": bias_key(attachment), "path": path}, lines), as_json=as_json)


def _about(options: CalibrateOptions, found: "Calibration") -> dict[str, str]:
    """Return what is noted in the file of the table."""
    return {
        "name": options.model,
        "rope": options.rope or "as trained",
        "segments": str(found.segments),
        "distances": str(found.table.shape[1]),
        "standard_error": f"{found.error:.4f}",
        "text": options.text.name if options.text else "the Python reference",
    }


def _check_out(path: Path) -> None:
    """Raise InputError where the table cannot be written, before the measurement that would then be lost."""
    there = next(folder for folder in path.absolute().parents if folder.exists())  # the rest is made
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"cannot write {path}: it is a folder, or its folder is not one, or not writable")
