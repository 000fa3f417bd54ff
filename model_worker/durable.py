"""Folders whose entries outlast a crash: a file that was synced is not there until its folder is."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make created, renamed and removed entries of `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make `folder` and its missing parents, durably; readable only by their owner."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(0o700, exist_ok=True)
    sync_folder(folder.parent)
