"""Files are opened here where a link or a pipe may stand in their place, and disks are asked for their free room."""

import os
from pathlib import Path


def opener(path: str, flags: int) -> int:
    """Open a file without following a link or waiting at a pipe: the argument of this name of `open`. Errors: OSError,
    with ELOOP for a link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def free_bytes(folder: Path | str) -> int:
    """Return the bytes that this user may still write to the disk of a folder. Errors: OSError."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
