"""Places that a command is to write to, looked at before its work, of which nothing would be left."""

import os
from pathlib import Path

from model_worker.errors import InputError


def check_writable(path: Path) -> None:
    """Raise InputError where the file `path` cannot be written; its folder must be there."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: it is a folder, or its folder is not there or not writable")


def make_writable(folder: Path) -> None:
    """Make a folder where it is missing. Raises InputError where it cannot be, or not be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be the folder of the pictures: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be the folder of the pictures: it is not writable")
