"""Files and folders are made here so that their owner alone can open them, because what is remembered is private.

This file owns the rule that this holds whatever the umask says.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FILE, FOLDER = 0o600, 0o700
_OTHERS = 0o077


def opener(path: str, flags: int) -> int:
    """Open a file, which is private where it is new: the argument of this name of `open`."""
    return os.open(path, flags, FILE)


def make_file(path: Path) -> None:
    """Make an empty file where there is none, before a library would make it as the umask says."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE))


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, also while other processes make the same. Errors: OSError."""
    try:
        _make(folder)
    except FileNotFoundError:
        if not folder.parent.is_dir():
            make_folder(folder.parent)
        # Once more: the parent may be there by now. Where no folder can be made, as in /proc, this is the error.
        _make(folder)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(FOLDER)
    except FileExistsError:
        if not folder.is_dir():
            raise


@contextmanager
def made_by_a_library() -> Iterator[None]:
    """Keep what a library makes in the block, such as a socket, to its owner: no argument says so, and a mode that is
    changed afterwards comes late. The umask is of the whole process, so the block must be short."""
    before = os.umask(_OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def is_open(path: Path) -> bool:
    """Tell whether others than its owner may open a file or folder; False for what is neither, or not there."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return bool(mode & _OTHERS) and (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_below(path: Path) -> Iterator[Path]:
    """Yield a file or folder where it is open to others, and what they reach through it, a folder before what is in it.
    No link is followed."""
    if is_open(path):
        yield path
        for inner in sorted(path.iterdir()) if path.is_dir() else ():
            yield from open_below(inner)


def close_ours(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Close to others what a folder has of ours, and the folder too where it has nothing else. is_ours: tells by a name
    whether it is ours."""
    entries = list(folder.iterdir())
    ours = [entry for entry in entries if is_ours(entry.name)]
    close(path for entry in ours for path in open_below(entry))
    if len(ours) == len(entries) and is_open(folder):
        close([folder])


def close(paths: Iterable[Path]) -> tuple[int, int]:
    """Close files and folders to others; return how many these were, and how many of them could not be closed. What all
    users share, such as / and /tmp, stays as it is."""
    found = left = 0
    for path in paths:
        if _is_shared(path):
            continue
        with suppress(OSError):
            os.chmod(path, stat.S_IMODE(os.lstat(path).st_mode) & ~_OTHERS)
        found, left = found + 1, left + is_open(path)
    return found, left


def _is_shared(path: Path) -> bool:
    """Tell whether a folder is the root of the file system, or has the sticky bit, by which users share it."""
    return path == Path(path.anchor) or bool(os.lstat(path).st_mode & stat.S_ISVTX)
