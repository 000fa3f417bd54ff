"""Disks are synced as a whole here: with one wait for all that was written to them. This file owns on which disks that
can be trusted, and that no error of theirs is missed."""

import ctypes
import errno
import os
import re
import threading
from collections.abc import Iterable
from typing import Any

_C: Any = ctypes.CDLL(None, use_errno=True)
# File systems whose `syncfs` waits for the disk, by the number that `statfs` tells: ext2 to ext4, XFS, Btrfs, F2FS, and
# tmpfs, which has nothing to wait for. One of FUSE, for example, may return at once, and tell its daemon nothing.
_TRUSTED = frozenset((0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994))
# Linux tells from this release on whether the disk could take everything.
_TELLS_FROM = (5, 8)


class WholeDisks:
    """The disks of some folders. Threads share it.

    A disk has a descriptor that stays open: an error of a disk is told once to each descriptor that was open before,
    and not to one that is opened after somebody else was told.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By the number of the device; None for a disk that is not trusted.
        self._descriptors: dict[int, int | None] = {}

    def trusts(self, folder: str) -> bool:
        """Tell whether the disk of a folder can be synced as a whole. No error of the disk is missed from now on."""
        try:
            return self._descriptor(folder) is not None
        except OSError:  # the folder is not there
            return False

    def sync(self, folders: Iterable[str]) -> None:
        """Make durable all that was written so far to the disks of some folders, by whatever process. Errors: OSError
        where a disk could not take all that was written since it was synced here before, or is not trusted."""
        for descriptor in {self._descriptor(folder) for folder in folders}:
            if descriptor is None:
                raise OSError(errno.ENOTSUP, "the disk does not say whether it has taken what was written")
            if _C.syncfs(descriptor):
                raise OSError(error := ctypes.get_errno(), os.strerror(error))

    def close(self) -> None:
        """Let all disks go."""
        with self._lock:
            descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            if descriptor is not None:
                os.close(descriptor)

    def _descriptor(self, folder: str) -> int | None:
        disk = os.stat(folder).st_dev
        with self._lock:
            if disk not in self._descriptors:
                self._descriptors[disk] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY) if _is_trusted(folder) else None
            return self._descriptors[disk]


def _is_trusted(folder: str) -> bool:
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if not hasattr(_C, "syncfs") or release is None or tuple(map(int, release.groups())) < _TELLS_FROM:
        return False
    found = ctypes.create_string_buffer(512)  # more than a `struct statfs` has, whose first field is the type
    return _C.statfs(os.fsencode(folder), found) == 0 and ctypes.c_long.from_buffer(found).value in _TRUSTED
