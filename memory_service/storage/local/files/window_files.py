"""The files of sessions' local windows: windows/<name>, one for each window that is kept.

A window is a cache, so that its file is not synced: what a power cut leaves of one does not have its checksum, and is
removed. This file owns that no file is removed while it is being written.
"""

import os
import secrets
import threading
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

import xxhash

from kvbank.files import private
from kvbank.files.opening import opener
from memory_service.domain.payload import Buffer

FOLDER = "windows"
_PIECE = 1024 * 1024


class NewWindow:
    """A file that is being written. Until it is `settled`, no sweep removes it."""

    def __init__(self, files: "WindowFiles", path: Path) -> None:
        """Make the file of a window. Errors: OSError."""
        self._files, self._path = files, path
        self._file = open(path, "xb", buffering=0, opener=private.opener)  # noqa: SIM115
        self._hash = xxhash.xxh3_64()
        self.size = 0

    @property
    def name(self) -> str:
        """Return the name by which the file is found again."""
        return self._path.name

    @property
    def checksum(self) -> int:
        """Return the xxh3-64 of what was written so far."""
        return self._hash.intdigest()

    def add(self, data: Buffer) -> None:
        """Append bytes to the file. Errors: OSError."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.size += len(view)
        while view:
            view = view[self._file.write(view) :]

    def store(self) -> None:
        """Return at once, because what was appended is in the file already."""

    def settled(self, *, kept: bool) -> None:
        """Close the file, and remove it unless it is `kept`. A second call does nothing."""
        if not self._file.closed:
            self._file.close()
            if not kept:
                self._files.remove(self.name)
            self._files.forget(self.name)


class OldWindow:
    """A file that is read; implements `memory_service.storage.base.Source`."""

    def __init__(self, path: Path) -> None:
        """Open the file for reading. Errors: OSError."""
        self._descriptor = opener(os.fspath(path), os.O_RDONLY)

    def read_at(self, room: memoryview, offset: int) -> int:
        """Fill `room` with the bytes from `offset` on, and return how many there were. Errors: OSError."""
        return os.preadv(self._descriptor, [room], offset)

    def close(self) -> None:
        """Close the file for good; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def has(self, size: int, checksum: int) -> bool:
        """Tell whether the file has so many bytes, of this xxh3-64. Errors: OSError."""
        if os.fstat(self._descriptor).st_size != size:
            return False
        found, room, at = xxhash.xxh3_64(), memoryview(bytearray(min(size, _PIECE))), 0
        while at < size and (length := self.read_at(room, at)):
            found.update(room[:length])
            at += length
        return found.intdigest() == checksum


class WindowFiles:
    """The folder of the windows in a data folder. Threads share it."""

    def __init__(self, data: Path) -> None:
        self._folder = data / FOLDER
        self._lock = threading.Lock()
        # The names of files that are being written, and the session of each.
        self._new: dict[str, str] = {}

    def begin(self, session_id: str) -> NewWindow:
        """Begin the file of a new window of a session. Errors: OSError."""
        private.make_folder(self._folder)
        name = secrets.token_hex(16)
        with self._lock:
            self._new[name] = session_id
        try:
            return NewWindow(self, self._folder / name)
        except BaseException:
            self.forget(name)
            raise

    def open(self, name: str) -> OldWindow:
        """Open the file of a window. Errors: OSError."""
        return OldWindow(self._folder / name)

    def remove(self, name: str) -> None:
        """Remove the file of this name; one that is gone already is fine. Errors: OSError."""
        with suppress(FileNotFoundError):
            os.unlink(self._folder / name)

    def forget(self, name: str) -> None:
        """Note that a file is written no more."""
        with self._lock:
            self._new.pop(name, None)

    def give_up(self, sessions: Container[str]) -> None:
        """Remove the files that are being written of some sessions, none of which is kept any more. Errors: OSError."""
        with self._lock:
            names = [name for name, session_id in self._new.items() if session_id in sessions]
        for name in names:
            self.remove(name)

    def being_written(self) -> set[str]:
        """Return the ids of the sessions of which a window is being written."""
        with self._lock:
            return set(self._new.values())

    def found(self) -> list[str]:
        """Return the names of the files that are there, but for those that are being written."""
        with suppress(FileNotFoundError):
            names = os.listdir(self._folder)
            with self._lock:
                return [name for name in names if name not in self._new]
        return []
