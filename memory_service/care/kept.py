"""A backup that is read, be it a folder or the prefix of a bucket. This file owns the choice, and that the records are
those that the manifest says."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kvbank.files import private
from memory_service.care import manifest
from memory_service.care.folder import DATABASE
from memory_service.care.payload_files import FilesRead
from memory_service.care.report import CareError
from memory_service.care.transfer import Origin
from memory_service.storage.opening import extras_named
from memory_service.storage.s3.location import SCHEME

_PART = 1 << 20


class Kept(NamedTuple):
    """A backup with its place as an operator writes it, its manifest, what brings its database into a folder, and its
    payloads."""

    title: str
    content: Mapping[str, Any]
    bring_records: Callable[[Path], None]
    payloads: Origin

    def fetch(self, folder: Path) -> None:
        """Bring the database into a folder, as it was written. Errors: CareError, OSError."""
        self.bring_records(folder)
        if manifest.digest(folder / DATABASE) != self.content["database"]["xxh3_64"]:
            raise CareError(f"the database of {self.title} does not match its checksum")


def in_bucket(place: str | Path) -> bool:
    """Tell whether the place of a backup is in a bucket: s3://BUCKET/PREFIX."""
    return str(place).startswith(SCHEME)


@contextmanager
def opened(place: str | Path) -> Iterator[Kept]:
    """Open a backup until the end of the block. Errors: CareError for what is no backup, StartError, OSError."""
    if not in_bucket(place):
        folder = Path(place)
        yield Kept(str(place), manifest.read(folder), partial(_copy, folder), FilesRead(folder))
        return
    with extras_named():
        from memory_service.care.bucket import reading
    with reading.opened(str(place)) as (content, bring, payloads):
        yield Kept(str(place), content, bring, payloads)


def _copy(backup: Path, folder: Path) -> None:
    with open(backup / DATABASE, "rb") as source, open(folder / DATABASE, "wb", opener=private.opener) as target:
        while part := source.read(_PART):
            target.write(part)
