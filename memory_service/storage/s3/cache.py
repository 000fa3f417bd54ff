"""The cache of payloads on this machine's disk: files in a folder of its own, bounded in bytes, the one that was used
least lately going first, also over a restart.

A file has what was read of one chunk, and its name says which parts of the object these are. The cache does not look
into it: its user compares the bytes with the chunk's descriptor whenever it opens a file. A file that was not written
to its end has a temporary name, and goes at the next start. Anybody may empty the folder at any time: what is missing
then is read again, and is never taken for a missing object.
"""

import errno
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvbank.files import locks, private
from kvbank.files.opening import opener
from memory_service.domain.errors import FolderInUse

_LOCK = "payloads.lock"
_TEMPORARY = ".tmp"
# The bytes in which disks give room to files.
_BLOCK = 4096


class Key(NamedTuple):
    """The bytes of a chunk that a file has. `parts` names the parts of its object that were read."""

    bank_uid: str
    chunk_id: int
    parts: str

    @property
    def chunk(self) -> tuple[str, int]:
        """Return the bank uid and the id of the chunk."""
        return self.bank_uid, self.chunk_id


class NewFile:
    """A file that is written for the cache, or for its user alone where the cache has no room or is not to keep it. Its
    user calls `keep` when it is whole, and `close` at the end."""

    def __init__(self, cache: "PayloadCache", key: Key, path: Path, size: int) -> None:
        """Make the file at a temporary path. Errors: OSError, but no FileNotFoundError, which would be the object's."""
        self._cache, self.key, self.path, self.size = cache, key, path, size
        self.wanted = True
        try:
            private.make_folder(path.parent)
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, private.FILE)
        except FileNotFoundError as error:
            raise OSError(errno.EIO, "the cache cannot be written", str(path)) from error

    def keep(self) -> None:
        """Let the cache have the file, unless its chunk was purged meanwhile."""
        self._cache.settle(self, kept=True)

    def close(self) -> None:
        """Close the file, which is gone unless the cache has it. A second call does nothing."""
        self._cache.settle(self, kept=False)
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class PayloadCache:
    """Files with parts of payloads, as many as a bound allows. Threads share it; one process has its folder."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Take over a folder with what an earlier process has left in it. Errors: FolderInUse, OSError."""
        private.make_folder(folder)
        self._folder, self._most = folder, most_bytes
        self._lock_file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, private.FILE)
        if not locks.take(self._lock_file):
            os.close(self._lock_file)
            raise FolderInUse(f"the cache {folder} is used by another process; name another folder")
        self._lock = threading.Lock()
        # The files by chunk, the chunk that was used last at the end: what each has of its object -> bytes.
        self._chunks: OrderedDict[tuple[str, int], dict[str, int]] = OrderedDict()
        # The files that are being written, whose bytes count as well.
        self._new: set[NewFile] = set()
        self._used = 0
        self._scan()

    # Reading

    def has(self, key: Key) -> bool:
        """Tell whether there is a file of this key."""
        with self._lock:
            return key.parts in self._chunks.get(key.chunk, ())

    def has_room_for(self, size: int) -> bool:
        """Tell whether a file of so many bytes may be kept."""
        return _rounded(size) <= self._most

    def open(self, key: Key) -> int | None:
        """Open the file of a key, which is the one that was used last from now on, and return its descriptor; None
        where there is none."""
        with self._lock:
            if key.parts not in self._chunks.get(key.chunk, ()):
                return None
            self._chunks.move_to_end(key.chunk)
        try:
            descriptor = opener(os.fspath(self._path(key)), os.O_RDONLY)
        except OSError:
            # Somebody has emptied the folder, or the file has just gone for another.
            self.drop(key)
            return None
        with suppress(OSError):
            # The order of use is read from here by the next process.
            os.utime(descriptor)
        return descriptor

    # Writing

    def begin(self, key: Key, size: int) -> NewFile:
        """Begin to write the file of a key, for which others go where the bound asks for it. Errors: OSError."""
        path = self._path(key).with_suffix(f".{secrets.token_hex(4)}{_TEMPORARY}")
        new = NewFile(self, key, path, _rounded(size))
        with self._lock:
            new.wanted = self._make_room(new.size)
            if new.wanted:
                self._new.add(new)
                self._used += new.size
        if not new.wanted:
            # It lives as long as its user has it open.
            path.unlink(missing_ok=True)
        return new

    def settle(self, new: NewFile, *, kept: bool) -> None:
        """End the writing of a file; a second call does nothing. kept: whether it is whole, and the cache may have
        it."""
        with self._lock:
            if new not in self._new:
                return
            self._new.remove(new)
            if kept and new.wanted and self._placed(new):
                files = self._chunks.setdefault(new.key.chunk, {})
                self._used -= files.get(new.key.parts, 0)
                files[new.key.parts] = new.size
                self._chunks.move_to_end(new.key.chunk)
            else:
                self._used -= new.size
                new.path.unlink(missing_ok=True)

    def _placed(self, new: NewFile) -> bool:
        """Give a file its name; return False where somebody has removed it."""
        with suppress(OSError):
            new.path.replace(self._path(new.key))
            return True
        return False

    def _make_room(self, size: int) -> bool:
        """Remove what was used least lately until there is room for so many bytes; tell whether there is."""
        if size + sum(new.size for new in self._new) > self._most:
            return False
        while self._used + size > self._most:
            chunk, files = self._chunks.popitem(last=False)
            self._remove(chunk, files)
        return True

    # Removing

    def drop(self, key: Key) -> None:
        """Remove the file of a key, which is damaged or gone."""
        with self._lock:
            files = self._chunks.get(key.chunk, {})
            if (size := files.pop(key.parts, None)) is not None:
                self._remove(key.chunk, {key.parts: size})
            if not files:
                self._chunks.pop(key.chunk, None)

    def banks(self) -> set[str]:
        """Return the uids of the banks of which there are files."""
        with self._lock:
            return {bank_uid for bank_uid, _ in self._chunks}

    def purge(self, bank_uid: str, chunk_ids: Iterable[int] | None = None) -> None:
        """Remove all files of chunks of a bank, and keep none that is being written. chunk_ids: None for the whole
        bank."""
        with self._lock:
            if chunk_ids is None:
                going = [chunk for chunk in self._chunks if chunk[0] == bank_uid]
                written = {new for new in self._new if new.key.bank_uid == bank_uid}
            else:
                going = [(bank_uid, chunk_id) for chunk_id in chunk_ids]
                written = {new for new in self._new if new.key.chunk in set(going)}
            for new in written:
                new.wanted = False
                new.path.unlink(missing_ok=True)
            for chunk in going:
                self._remove(chunk, self._chunks.pop(chunk, {}))

    def used(self) -> int:
        """Return the bytes of all files, in whole blocks."""
        with self._lock:
            return self._used

    def close(self) -> None:
        """Let another process have the folder, whose files stay. A second call does nothing."""
        descriptor, self._lock_file = self._lock_file, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _remove(self, chunk: tuple[str, int], files: dict[str, int]) -> None:
        for parts, size in files.items():
            self._used -= size
            with suppress(OSError):
                self._path(Key(*chunk, parts)).unlink()

    # The folder

    def _path(self, key: Key) -> Path:
        return self._folder / key.bank_uid / f"{key.chunk_id}.{key.parts}"

    def _scan(self) -> None:
        """Learn which files there are, and remove those that are beyond the bound or were not written to their end."""
        found = []
        for entry in _files_below(self._folder):
            chunk_id, _, parts = entry.name.partition(".")
            if entry.name.endswith(_TEMPORARY):
                os.unlink(entry.path)
            elif chunk_id.isdecimal() and parts:
                stat = entry.stat(follow_symlinks=False)
                key = Key(Path(entry.path).parent.name, int(chunk_id), parts)
                found.append((stat.st_mtime_ns, key, _rounded(stat.st_size)))
        for _, key, size in sorted(found):
            self._chunks.setdefault(key.chunk, {})[key.parts] = size
            self._chunks.move_to_end(key.chunk)
            self._used += size
        self._make_room(0)


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the files in the folders of banks; a folder that has none is removed."""
    for bank in list(os.scandir(folder)):
        if bank.is_dir(follow_symlinks=False):
            with suppress(OSError):
                os.rmdir(bank.path)
                continue
            yield from (entry for entry in os.scandir(bank.path) if entry.is_file(follow_symlinks=False))
