"""The data folder of a process is made here, and is owned by one process at a time. This file owns the lock.

The folder itself is locked, because it cannot be removed while anything is in it. The file kvbank.lock says which
process owns the folder, for people and for messages; it is locked too, because earlier servers lock nothing else.
"""

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvbank.files import durable, locks
from memory_service.domain.errors import FolderInUse, StartError
from memory_service.storage.local.files import access

# A folder with a file of this name is a backup.
MANIFEST = "backup.json"
# A folder with a file of this name is a copy of another store that is not finished.
UNFINISHED = "unfinished-copy"
NOTE = "kvbank.lock"


def refuse_unfinished(path: Path) -> None:
    """Refuse a folder that is a copy of another store which is not finished. Errors: StartError, OSError."""
    if (path / UNFINISHED).exists():
        raise StartError(f"{path} is an unfinished copy of another store; go on with: kvbank store copy FROM {path}")


class DataFolder:
    """Owns a data folder for this process, until `release`."""

    def __init__(self, path: Path, *, unfinished: bool = False) -> None:
        """Make the folder where there is none, and own it. unfinished: whether it may be a copy that is not finished.
        Errors: StartError where another server owns it, it has files of others, or it cannot be written to."""
        try:
            if (path / MANIFEST).exists():
                raise StartError(f"{path} is a backup; put it in place with: kvbank restore {path} DATA")
            if not unfinished:
                refuse_unfinished(path)
            access.check_own(path)
            durable.make_folder(path, open_parents=True)
            self._descriptors = _lock(path)
        except OSError as error:
            why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
            raise StartError(f"cannot use {path} as data folder: {why}") from error
        _held.add(self)

    def release(self) -> None:
        """Let another server own the folder, also where a child that was not forked by Python still has it open."""
        for descriptor in self._descriptors:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        """Close the folder without unlocking it: this is for a forked child, whose parent goes on to own it."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)


_held: "weakref.WeakSet[DataFolder]" = weakref.WeakSet()


def _forget_all() -> None:
    for folder in list(_held):
        folder.forget()


# A child that outlived the server would keep the folder locked.
os.register_at_fork(after_in_child=_forget_all)


def _lock(path: Path) -> list[int]:
    """Lock a folder and its note, and return their descriptors. Errors: FolderInUse, OSError."""
    descriptors: list[int] = []
    try:
        descriptors.append(_open_folder(path))
        _take(descriptors[0], path)
        while not os.path.samestat(os.fstat(descriptors[0]), os.stat(path)):
            # Another folder was put in its place since it was opened.
            os.close(descriptors.pop())
            descriptors.append(_open_folder(path))
            _take(descriptors[0], path)
        descriptors.append(os.open(path / NOTE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        # Another user who could open it could lock it.
        os.fchmod(descriptors[1], 0o600)
        _take(descriptors[1], path)
        with suppress(OSError):  # a full disk; the note is for people
            os.ftruncate(descriptors[1], 0)
            os.pwrite(descriptors[1], f"process {os.getpid()}\n".encode(), 0)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return descriptors


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _take(descriptor: int, path: Path) -> None:
    if not locks.take(descriptor):
        raise FolderInUse(f"{path} is in use by {_owner(path)}; one server owns a data folder", _since(path))


def _owner(path: Path) -> str:
    """Name the process that owns a folder, as far as the note says it."""
    with suppress(OSError):
        said = (path / NOTE).read_bytes()[:100].decode(errors="replace").strip()
        if said:
            return said
    return "another process"


def _since(path: Path) -> int:
    """Return when a folder was taken last, in nanoseconds of its file system's clock; 0 where the note does not say."""
    with suppress(OSError):
        return (path / NOTE).stat().st_mtime_ns
    return 0


@contextmanager
def unserved(path: Path) -> Iterator[bool]:
    """Tell whether no process owns the folder. Inside the block none can begin to, so the block must be short."""
    descriptor = _open_folder(path)
    try:
        yield locks.take(descriptor, shared=True)
    finally:
        os.close(descriptor)
