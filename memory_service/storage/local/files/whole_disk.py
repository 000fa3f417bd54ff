"""A whole disk is synced here, with one wait for all that was written to it."""

import ctypes
import errno
import os
import re
from typing import Any

# The C library's, which Python's modules leave out.
_SYNCFS: Any = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
_RELEASE = re.match(r"(\d+)\.(\d+)", os.uname().release)
# Linux tells from 5.8 on whether the disk could take everything.
_TELLS = bool(_SYNCFS and _RELEASE and tuple(map(int, _RELEASE.groups())) >= (5, 8))


def sync_disk(folder: str) -> None:
    """Make durable all that was written so far to the disk of a folder, by whatever process. Errors: OSError where the
    disk could not take all of it since it was synced before, and where the system does not tell that."""
    if not _TELLS:
        raise OSError(errno.ENOSYS, "this system does not tell whether a disk has taken all that was written")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _SYNCFS(descriptor):
            raise OSError(error := ctypes.get_errno(), os.strerror(error))
    finally:
        os.close(descriptor)
