"""The places of stores as an operator writes them: a data folder, or the URL of a database with the place of its
payloads. This file owns the choice of an end for each, and that the packages of a database are only needed for one."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from memory_service.care.copying import folder_end
from memory_service.care.copying.ends import Exported, Imported, Mark
from memory_service.care.report import CareError
from memory_service.settings import DATABASES, is_url
from memory_service.storage.opening import extras_named


class Place(NamedTuple):
    """A data folder, or a database with its objects (s3://BUCKET/PREFIX)."""

    data: str
    objects: str = ""

    @property
    def in_database(self) -> bool:
        """Tell whether the data are in a database."""
        return self.data.startswith(DATABASES)

    @property
    def folder(self) -> Path:
        """Return the data folder. Not for data in a database."""
        return Path(self.data)


def check(place: Place, option: str) -> Place:
    """Refuse a place that cannot be one. option: that which says where the objects are. Errors: CareError."""
    if not place.in_database and is_url(place.data):
        scheme = place.data.partition("://")[0]
        raise CareError(f"{scheme}:// is no place for data; give a folder, or {DATABASES[0]}...")
    if place.in_database and not place.objects:
        raise CareError(f"data in a database need the place of their payloads: {option} s3://BUCKET/PREFIX")
    if place.objects and not place.in_database:
        raise CareError(f"{option} is for data in a database; a data folder has its payloads itself")
    return place


@contextmanager
def reading(place: Place, *, live: bool = False) -> Iterator[Exported]:
    """Open a store for reading until the end of the block. live: whether services may have a database open. Errors:
    CareError, StartError."""
    if not place.in_database:
        with folder_end.read(place.folder) as end:
            yield end
        return
    with extras_named():
        from memory_service.care.copying import database_end
    with database_end.read(place.data, place.objects, live=live) as found:
        yield found


def making(place: Place, mark: Mark) -> AbstractContextManager[Imported]:
    """Begin a store that is to be a copy, or take up one that was begun. Errors: CareError, StartError."""
    if not place.in_database:
        return folder_end.made(Path(os.path.abspath(place.data)), mark)
    with extras_named():
        from memory_service.care.copying import database_end
    return database_end.made(place.data, place.objects, mark)
