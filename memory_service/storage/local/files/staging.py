"""Payload files that clients on this host have made themselves. This file owns how the service takes one over: the file
belongs to the service, under a name that its maker does not know, before one byte of it is believed."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvbank.files import private
from kvbank.files.opening import opener
from memory_service.domain.errors import staged_file

FOLDER = "staging"


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file that a client names: `offset` bytes of room for a header, then the tensors."""

    folder: Path
    name: str
    offset: int

    @contextmanager
    def taken(self, new: str, length: int) -> Iterator[int]:
        """Move the file to `new` and yield its descriptor, once it has `length` bytes of tensors. Errors:
        STAGED_FILE."""
        old = self.folder / self.name
        try:
            self._check(os.lstat(old), length)
            os.rename(old, new)
            descriptor = opener(new, os.O_RDWR)
        except OSError as error:
            raise staged_file(self.name, f"cannot be opened ({error.strerror})") from error
        try:
            # What was looked at before may have been another file.
            self._check(os.fstat(descriptor), length)
            os.fchmod(descriptor, private.FILE)
            yield descriptor
        finally:
            os.close(descriptor)

    def discard(self) -> None:
        """Remove the file, which no write takes over; one that is gone, or was never there, is fine."""
        with suppress(OSError):
            os.unlink(self.folder / self.name)

    def _check(self, found: os.stat_result, length: int) -> None:
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
            raise staged_file(self.name, "is not a regular file of this user with one name")
        if found.st_size != self.offset + length:
            raise staged_file(self.name, f"has {found.st_size} bytes, must have {self.offset} + {length}")
