"""The payload files of a folder as both ends of a transfer. This file owns the rule that each file is verified as it is
put in place, whether it is copied, linked from an older backup, or was there from an interrupted run."""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvbank.files import durable, private
from memory_service.care import payload_file
from memory_service.care.entries import Entry
from memory_service.care.folder import Folder
from memory_service.care.payload_check import THREADS, orphans
from memory_service.care.report import Kind
from memory_service.storage.base import DamagedError
from memory_service.storage.local.files import layout


class FilesRead:
    """Implements `memory_service.care.transfer.Origin` for a data folder or a backup."""

    def __init__(self, folder: Path, records: Folder | None = None) -> None:
        """Read the files of a folder. records: the same folder, where it is a data folder, whose records have the bytes
        of files that are not synced."""
        self._folder, self._records = folder, records

    def read(self, entry: Entry) -> bytes:
        """Return the file of a chunk, verified; see `Origin.read`."""
        file = self._records.unsynced([entry.chunk_id]).get(entry.chunk_id) if self._records else None
        if file is None:
            return _read(self._folder, entry)
        assert entry.payload is not None
        payload_file.verify(file, entry.bank.uid, entry.chunk_id, entry.payload)
        return file

    def trouble(self, entry: Entry, error: DamagedError | OSError) -> tuple[Kind, str]:
        """Say what is wrong with a file; see `Origin.trouble`."""
        return payload_file.trouble(self._folder / _name(entry), error)


class FilesMade:
    """Implements `memory_service.care.transfer.Destination` for a folder in the making."""

    threads = THREADS

    def __init__(self, folder: Path, base: Path | None = None) -> None:
        """Make files in a folder. base: an older backup, whose files are linked where they are the same."""
        self._folder, self._base = folder, base

    def expect(self, page: Sequence[Entry]) -> None:
        """Do nothing, since files are looked for one by one."""

    def there(self, entry: Entry) -> str:
        """Find the file of a chunk, or link it; see `Destination.there`."""
        name = _name(entry)
        target = self._folder / name
        if _sound(self._folder, entry):
            return "reused"
        target.unlink(missing_ok=True)
        private.make_folder(target.parent)
        linked = self._base is not None and _sound(self._base, entry) and _link(self._base / name, target)
        return "linked" if linked else ""

    def put(self, entry: Entry, data: bytes) -> None:
        """Make the file of a chunk; its name becomes durable with the whole folder."""
        durable.replace(self._folder / _name(entry), [data], sync="bytes")

    def tidy(self, named: Folder) -> None:
        """Remove what an interrupted run brought; see `Destination.tidy`."""
        for name in orphans(named):
            remove(self._folder / name)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _name(entry: Entry) -> str:
    return layout.name(entry.bank.uid, entry.chunk_id)


def _read(folder: Path, entry: Entry) -> bytes:
    assert entry.payload is not None
    return payload_file.read(folder / _name(entry), entry.bank.uid, entry.chunk_id, entry.payload)


def _sound(folder: Path, entry: Entry) -> bool:
    try:
        _read(folder, entry)
    except (DamagedError, OSError):
        return False
    return True


def _link(source: Path, target: Path) -> bool:
    """Link a file, durably; return False where the file systems differ, or have had enough links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EMLINK, errno.EPERM):
            return False
        raise
    private.close([target])  # as an earlier version may have made it
    # The older backup may be a copy that a person has just made, and that was not synced.
    durable.sync_file(target)
    return True
