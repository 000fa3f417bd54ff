"""A folder in the making. This file owns the order: it is NAME.partial until it is whole and durable, and is then
renamed to NAME.

What an interrupted run left in NAME.partial is there for the next one, which holds its lock.
"""

import os
import shutil
from pathlib import Path
from types import TracebackType

from kvbank.files import durable, locks, private
from memory_service.care.folder import DATABASE
from memory_service.care.report import CareError
from memory_service.storage.local.files.folder import MANIFEST
from memory_service.storage.local.files.layout import FOLDER

_OURS = {MANIFEST, f"{MANIFEST}.tmp", FOLDER, *(f"{DATABASE}{suffix}" for suffix in ("", "-wal", "-shm", "-journal"))}


class Making:
    """Builds a new folder in `partial`, whose lock it holds until the end of the `with` block."""

    def __init__(self, place: Path, *, empty_is_free: bool = False) -> None:
        """Make or take up the unfinished folder. empty_is_free: whether an empty folder may be in its place. Errors:
        CareError where the place is taken, or another process builds there."""
        place = place.absolute()
        self._place, self._empty_is_free = place, empty_is_free
        self._check_free()
        if not place.parent.is_dir():
            raise CareError(f"there is no folder {place.parent}")
        self.partial = place.with_name(place.name + ".partial")
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            raise CareError(f"{self.partial} is in the way")
        private.make_folder(self.partial)
        self._lock = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._claim()
            private.close(private.open_below(self.partial))  # as a run of an earlier version may have left it
        except BaseException:
            os.close(self._lock)
            raise

    def _check_free(self) -> None:
        place = self._place
        if self._empty_is_free and place.is_dir() and not any(place.iterdir()):
            return
        if place.exists() or place.is_symlink():
            raise CareError(f"{place} exists" + (" and is not an empty folder" if self._empty_is_free else ""))

    def _claim(self) -> None:
        if not locks.take(self._lock):
            raise CareError(f"{self.partial} is being written by another process")
        if strange := {entry.name for entry in os.scandir(self.partial)} - _OURS:
            raise CareError(f"{self.partial} is in the way: {min(strange)} is not of an interrupted run")

    def finish(self) -> None:
        """Make all of it durable, then give it its name."""
        for folder, _, files in os.walk(self.partial, topdown=False):
            if Path(folder) == self.partial:
                for name in files:
                    durable.sync_file(self.partial / name)
            durable.sync_folder(Path(folder))
        self._check_free()
        os.rename(self.partial, self._place)
        durable.sync_folder(self._place.parent)

    def discard(self) -> None:
        """Remove what was built."""
        shutil.rmtree(self.partial)

    def __enter__(self) -> "Making":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the making of the folder: what was refused is removed, what was interrupted is left for the next run."""
        if isinstance(error, CareError):
            self.discard()
        os.close(self._lock)
