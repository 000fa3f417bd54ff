"""Bytes that a data folder keeps for the day when its disk is full. Owns that a start then has what it needs to read,
to delete and to end: SQLite makes files of its own for that."""

import errno
import logging
import os
from contextlib import suppress
from pathlib import Path

from kvbank import _private

NAME, SIZE = "kvbank.ballast", 1024 * 1024
_log = logging.getLogger(__name__)


def drop_if_needed(data: Path) -> None:
    """Give the bytes back to a disk that has less than that many left."""
    if free(data) < SIZE:
        with suppress(FileNotFoundError):
            (data / NAME).unlink()
            _log.warning("the disk of %s is full; what was kept for that is used now", data)


def take(data: Path, min_free: int) -> None:
    """Keep the bytes, where there is room for them beside `min_free`."""
    if (data / NAME).exists() or free(data) < min_free + 2 * SIZE:
        return
    try:
        descriptor = os.open(data / NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _private.FILE)
        try:
            os.posix_fallocate(descriptor, 0, SIZE)
        finally:
            os.close(descriptor)
    except OSError as error:
        # A file system that cannot do it, or is full by now.
        _log.debug("no ballast in %s: %s", data, error)
        with suppress(OSError):
            (data / NAME).unlink()


def free(data: Path) -> int:
    """Bytes that this user may still write."""
    stat = os.statvfs(data)
    return stat.f_bavail * stat.f_frsize


def explained(data: Path, error: Exception) -> str:
    """Why a folder cannot be opened, in one line: SQLite says of a full disk that it has an error."""
    left = free(data)
    if left < SIZE or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return f"its disk is full ({left} bytes are free); make room for {SIZE} bytes and start again"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
