"""The bytes of sessions' local windows in a bucket: windows/<session>/<name>, an object for each window that is kept.

This file owns that an object is whole as soon as it is there: a window comes into a file without a name, and is put
into the bucket when all of it has come. What is read of one comes into such a file too, so that it can be read to the
end after the object was deleted.
"""

import mmap
import os
import secrets
import tempfile
import threading
from collections.abc import Container
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

import xxhash

from memory_service.domain.payload import Buffer
from memory_service.storage.s3.bucket import Bucket

FOLDER = "windows"
_PIECE = 8 * 1024 * 1024


class NewWindowObject:
    """A window whose bytes come in; implements `storage.sessions.windows.NewBytes`."""

    def __init__(self, objects: "WindowObjects", name: str, file: IO[bytes]) -> None:
        self._objects, self._file = objects, file
        self._hash = xxhash.xxh3_64()
        self._stored = False
        self.name = name
        self.size = 0

    @property
    def checksum(self) -> int:
        """Return the xxh3-64 of what has come so far."""
        return self._hash.intdigest()

    def add(self, data: Buffer) -> None:
        """Append bytes to the file. Errors: OSError."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.size += len(view)
        self._file.write(view)

    def store(self) -> None:
        """Put all that has come into the bucket. Errors: OSError."""
        self._file.flush()
        self._stored = True
        with mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ) as whole, memoryview(whole) as view:
            pieces = [view[at : at + _PIECE] for at in range(0, len(view), _PIECE)]
            try:
                self._objects.bucket.put_new(self._objects.key(self.name), pieces)
            finally:
                for piece in pieces:
                    piece.release()

    def give_up(self) -> None:
        """Drop what has come. Errors: OSError."""
        self._file.truncate(0)

    def settled(self, *, kept: bool) -> None:
        """Close the file, and delete the object unless it is `kept`. A second call does nothing."""
        if self._file.closed:
            return
        self._file.close()
        self._objects.forget(self.name)
        if self._stored and not kept:
            self._objects.remove(self.name)


class OldWindowObject:
    """A window that is read; implements `storage.sessions.windows.OldBytes`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read_at(self, room: memoryview, offset: int) -> int:
        """Fill `room` with the bytes from `offset` on, and return how many there were. Errors: OSError."""
        return os.preadv(self._file.fileno(), [room], offset)

    def close(self) -> None:
        """Close the file for good; a second call does nothing."""
        self._file.close()

    def has(self, size: int, checksum: int) -> bool:
        """Tell whether the window has so many bytes, of this xxh3-64. Errors: OSError."""
        if os.fstat(self._file.fileno()).st_size != size:
            return False
        found, room, at = xxhash.xxh3_64(), memoryview(bytearray(min(size, _PIECE))), 0
        while at < size and (length := self.read_at(room, at)):
            found.update(room[:length])
            at += length
        return found.intdigest() == checksum


class WindowObjects:
    """The windows in a bucket; implements `storage.sessions.windows.WindowFiles`. Threads share it."""

    def __init__(self, bucket: Bucket, folder: Path, grace_s: float) -> None:
        """Keep windows in a bucket. folder: has the files without names. grace_s: the age in seconds from which on an
        object that no row names is none that another service is about to keep."""
        self.bucket = bucket
        self._folder, self._grace = folder, timedelta(seconds=grace_s)
        self._lock = threading.Lock()
        # What comes in now, by name.
        self._new: dict[str, NewWindowObject] = {}

    @staticmethod
    def key(name: str) -> str:
        """Return the key of the object of a window."""
        return f"{FOLDER}/{name}"

    def begin(self, session_id: str) -> NewWindowObject:
        """Begin a new window of a session. Errors: OSError."""
        new = NewWindowObject(self, f"{session_id}/{secrets.token_hex(16)}", self._file())
        with self._lock:
            self._new[new.name] = new
        return new

    def open(self, name: str) -> OldWindowObject:
        """Read a window into a file. Errors: FileNotFoundError, OSError."""
        file, at = self._file(), 0
        try:
            while True:
                part = self.bucket.read(self.key(name), at, at + _PIECE)
                file.write(part.data)
                at += len(part.data)
                if at >= part.size or not part.data:
                    file.flush()
                    return OldWindowObject(file)
        except BaseException:
            file.close()
            raise

    def remove(self, name: str) -> None:
        """Delete the object of this name; one that is gone already is fine. Errors: OSError."""
        self.bucket.delete([self.key(name)])

    def found(self) -> list[str]:
        """Return the names of the objects that are there, but for young ones, which a row may name soon."""
        before = datetime.now(UTC) - self._grace
        listed = (each for page in self.bucket.pages(FOLDER) for each in page)
        return [each.key.removeprefix(f"{FOLDER}/") for each in listed if each.modified < before]

    def forget(self, name: str) -> None:
        """Note that a window does not come in any more."""
        with self._lock:
            self._new.pop(name, None)

    def give_up(self, sessions: Container[str]) -> None:
        """Drop what has come of the windows of some sessions, none of which is kept any more. Errors: OSError."""
        with self._lock:
            for name, new in self._new.items():
                if name.split("/")[0] in sessions:
                    new.give_up()

    def being_written(self) -> set[str]:
        """Return the ids of the sessions of which a window comes in."""
        with self._lock:
            return {name.split("/")[0] for name in self._new}

    def _file(self) -> IO[bytes]:
        """Make a file without a name."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return tempfile.TemporaryFile(dir=self._folder)
