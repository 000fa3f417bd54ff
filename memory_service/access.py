"""Who may open a data folder: its owner. What an earlier version, or a copy, has left open to others on the machine is
closed at the start, and said. Only what has a name of ours is touched, and a data folder is begun only in a folder that
has nothing else, since closing a folder of others would take it from them."""

import logging
from collections.abc import Iterator
from pathlib import Path

from kvbank import _private
from memory_service import payloads, quarantine, staging
from memory_service.errors import StartError

_FOLDERS = (payloads.FOLDER, quarantine.FOLDER, staging.FOLDER, "indexes")
_DATABASE = tuple(f"metadata.db{suffix}" for suffix in ("", "-wal", "-shm", "-journal"))
_FILES = (*_DATABASE, "chunk-ids", "kvbank.ballast", "kvbank.lock", "backup.json")
# What a file system makes by itself in the root of a disk.
_NOBODYS = {"lost+found"}
_log = logging.getLogger(__name__)


def check_own(data: Path) -> None:
    """Refuse to begin a data folder among files of others. Errors: StartError, OSError."""
    if not data.is_dir():
        return
    there = {path.name for path in data.iterdir()} - _NOBODYS
    if there and there.isdisjoint((*_FILES, *_FOLDERS)):
        raise StartError(f"{data} has other files and no memory; name a folder of its own, such as {data / 'kvbank'}")


def open_to_others(data: Path) -> Iterator[Path]:
    """What others reach of a data folder or a backup, a folder before what is in it: nothing where the folder itself is
    closed to them, except what lies on another disk, behind a link."""
    data = data.resolve()
    ours = [data / name for name in (*_FILES, *_FOLDERS)]
    if _private.is_open(data):
        yield data
    else:
        ours = [path for path in ours if path.is_symlink()]
    for path in ours:
        yield from _private.open_below(path.resolve())


def tighten(data: Path) -> None:
    """Close to others what they reach."""
    found, left = _private.close(open_to_others(data))
    if found:
        end = f"{left} of them cannot be closed" if left else "they are closed now"
        _log.warning("%d files and folders of %s could be opened by other users of this machine; %s", found, data, end)
