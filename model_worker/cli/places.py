"""The places that a command is to write to are checked here before its work, which would else be lost."""

import importlib
import os
from pathlib import Path

from model_worker.errors import InputError


def check_writable(path: Path) -> None:
    """Raise InputError where the file `path` cannot be written; its folder must be there."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: it is a folder, or its folder is not there or not writable")


def check_plot(path: Path | None) -> None:
    """Check the file of a picture that is wanted, and that matplotlib is there to draw it.

    Raises InputError where the file cannot be written, and ModuleNotFoundError without matplotlib.
    """
    if path is not None:
        check_writable(path)
        importlib.import_module("matplotlib")


def make_plot_folder(folder: Path | None) -> None:
    """Make the folder of pictures that are wanted, and check that matplotlib is there to draw them.

    Raises InputError where the folder cannot be made or not be written to, and ModuleNotFoundError without matplotlib.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be the folder of the pictures: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be the folder of the pictures: it is not writable")
    importlib.import_module("matplotlib")
