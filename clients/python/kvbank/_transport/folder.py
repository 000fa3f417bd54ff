"""A folder is kept open as a descriptor, so that what is opened, made and removed below it stays below it, whatever its
path leads to by then and whatever links lie in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Folder:
    """A folder that is open as long as this object lives. Names are relative, with "/" between their parts.
    Errors of all methods: OSError."""

    def __init__(self, path: bytes | str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = path

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    def same(self, other: "Folder") -> bool:
        """Tell whether both are one folder."""
        return os.path.samestat(os.fstat(self._descriptor), os.fstat(other._descriptor))

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Open a file to read; the descriptor is closed at the end of the block."""
        with self._parent(name) as (parent, last):
            descriptor = os.open(last, _READ, dir_fd=parent)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def created(self, name: str) -> int:
        """Make a file that this user alone can open; the caller writes to its descriptor and closes it."""
        with self._parent(name) as (parent, last):
            return os.open(last, _CREATE, 0o600, dir_fd=parent)

    def removed(self, name: str) -> None:
        """Remove the file of this name."""
        with self._parent(name) as (parent, last):
            os.unlink(last, dir_fd=parent)

    def reached(self, name: str) -> str:
        """Return a path of a file in the folder itself, for calls that take no descriptor.

        The path leads there by the descriptor: on Linux alone, and as long as the folder is open.
        """
        return f"/proc/self/fd/{self._descriptor}/{name}"

    @contextmanager
    def _parent(self, name: str) -> Iterator[tuple[int, str]]:
        *folders, last = name.split("/")
        if not all(map(plain, (*folders, last))):
            raise OSError(f"{name!r} is not a relative name")
        descriptor = os.dup(self._descriptor)
        try:
            for part in folders:
                parent, descriptor = descriptor, os.open(part, _READ | os.O_DIRECTORY, dir_fd=descriptor)
                os.close(parent)
            yield descriptor, last
        finally:
            os.close(descriptor)


def plain(name: str) -> bool:
    """Tell whether a name can be that of an entry of a folder."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name
