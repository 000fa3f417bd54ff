"""The ballast of a data folder: a file that takes bytes for the day when the disk is full. This file owns that a start
has the room that it then needs to read, to delete and to end, because SQLite makes files of its own for that."""

import errno
import logging
import os
from contextlib import suppress
from pathlib import Path

from kvbank.files import private
from kvbank.files.opening import free_bytes

NAME, SIZE = "kvbank.ballast", 1024 * 1024
_log = logging.getLogger(__name__)


def drop_if_needed(data: Path) -> None:
    """Give the ballast back to a disk that has fewer free bytes than it has."""
    if free_bytes(data) < SIZE:
        with suppress(FileNotFoundError):
            (data / NAME).unlink()
            _log.warning("the disk of %s is full; what was kept for that is used now", data)


def take(data: Path, min_free: int) -> None:
    """Make the ballast, where there is room for it beside `min_free` bytes."""
    if (data / NAME).exists() or free_bytes(data) < min_free + 2 * SIZE:
        return
    try:
        descriptor = os.open(data / NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, private.FILE)
        try:
            os.posix_fallocate(descriptor, 0, SIZE)
        finally:
            os.close(descriptor)
    except OSError as error:
        # The file system cannot reserve bytes, or is full by now.
        _log.debug("no ballast in %s: %s", data, error)
        with suppress(OSError):
            (data / NAME).unlink()


def explained(data: Path, error: Exception) -> str:
    """Say in one line why a folder cannot be opened. An error of a full disk is named as such, which SQLite does not
    do."""
    left = free_bytes(data)
    if left < SIZE or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return f"its disk is full ({left} bytes are free); make room for {SIZE} bytes and start again"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
