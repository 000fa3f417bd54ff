"""Files and folders are made and replaced here so that they outlast a crash and a power cut.

This file owns the order of that: the bytes of a file are synced before the file gets its name, and the folder that has
the name is synced after that; the name of a new folder is synced in the folder above. Files that are made here can be
opened by their owner alone.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from kvbank.files import private

# What is durable when a file was replaced: nothing, its bytes, or its name too. A caller who says "bytes" syncs the
# folder later, together with other changes in it.
Sync = Literal["nothing", "bytes", "name"]


def sync_folder(folder: Path | str) -> None:
    """Make the entries of a folder durable: new, renamed and removed names. Errors: OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable, whatever process wrote them. Errors: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, *, open_parents: bool = False) -> None:
    """Make a folder and its missing parents, durably and private to their owner.

    open_parents: whether missing parents are as the umask says. Errors: OSError.
    """
    if folder.is_dir():
        return
    missing = [level for level in (folder, *folder.parents) if not level.exists()]
    if open_parents:
        folder.parent.mkdir(parents=True, exist_ok=True)
    private.make_folder(folder)
    for level in reversed(missing):
        sync_folder(level.parent)


def replace(
    path: Path, parts: Iterable[bytes | memoryview], *, sync: Sync = "name", temporary: Path | None = None
) -> None:
    """Put a file of these bytes in the place of `path`: other processes, and a crash, see the old file or the new one.

    temporary: a file in the same folder, by default of the same name with the suffix .tmp. It is removed after an
    error, and no link in its place is followed. Errors: OSError.
    """
    with (
        renamed(temporary or path.with_suffix(".tmp"), path) as unfinished,
        open(unfinished, "wb", opener=_opener) as file,
    ):
        for part in parts:
            file.write(part)
        if sync != "nothing":
            file.flush()
            os.fsync(file.fileno())
    if sync == "name":
        sync_folder(path.parent)


@contextmanager
def renamed(temporary: Path, path: Path) -> Iterator[Path]:
    """Give the file that the block makes as `temporary` the name `path`; after an error, remove it. Errors: OSError."""
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _opener(path: str, flags: int) -> int:
    return private.opener(path, flags | os.O_NOFOLLOW)
