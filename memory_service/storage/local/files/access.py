"""Who may open a data folder. This file owns the rule that only its owner may: where an earlier version, or a copy, has
left files open to other users of the machine, a start closes them, and says so in the log. It touches only what has a
name that the service gives, and a data folder is begun only where no files of others are: to close their folder would
take it from them."""

import logging
from collections.abc import Iterator
from pathlib import Path

from kvbank.files import private
from memory_service.domain.errors import StartError
from memory_service.storage.local.files import layout, staging, window_files

_FOLDERS = (layout.FOLDER, layout.QUARANTINE, staging.FOLDER, window_files.FOLDER, "indexes")
_DATABASE = tuple(f"metadata.db{suffix}" for suffix in ("", "-wal", "-shm", "-journal"))
_FILES = (*_DATABASE, "chunk-ids", "kvbank.ballast", "kvbank.lock", "backup.json", "unfinished-copy")
# Names that a file system makes by itself in the root of a disk.
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
    """Yield the files and folders of a data folder, or a backup, that others can open, a folder before its content.
    Where the data folder itself is closed to them, these are only those that lie on another disk, behind a link."""
    data = data.resolve()
    ours = [data / name for name in (*_FILES, *_FOLDERS)]
    if private.is_open(data):
        yield data
    else:
        ours = [path for path in ours if path.is_symlink()]
    for path in ours:
        yield from private.open_below(path.resolve())


def tighten(data: Path) -> None:
    """Close to others the files and folders of a data folder that they can open, and log how many there were."""
    found, left = private.close(open_to_others(data))
    if found:
        end = f"{left} of them cannot be closed" if left else "they are closed now"
        _log.warning("%d files and folders of %s could be opened by other users of this machine; %s", found, data, end)
