"""How far a cache on the disk of a service is free of what was forgotten, kept beside the cache. This file owns that a
service whose note cannot be believed takes its cache for one that has everything."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvbank.files import durable
from memory_service.storage.forgetting.receipt_row import KEPT_US
from memory_service.storage.postgres.rows.purge_rows import Purge

_NAME = "purged.json"
# The note is believed for so long a time less than rows of purges are kept: clocks of services differ.
_MARGIN_US = 24 * 3600 * 1_000_000


class Note(NamedTuple):
    """The last purge that a cache has followed, its time, and when the service looked for purges last: microseconds
    since 1970. The number is 0 where there was none."""

    number: int
    time: int
    seen: int

    def holds(self, last: Purge | None, now: int) -> bool:
        """Tell whether all purges behind this one are in the database. last: what the database has of its number."""
        if self.seen <= now - KEPT_US + _MARGIN_US:
            return False
        if last is None:
            return self.number == 0 or self.time <= now - KEPT_US
        # Another time is of a database that was put back from a backup, and has given the number again.
        return last.time == self.time


class PurgedCache:
    """The folders of a cache, and the note beside them."""

    def __init__(self, folder: Path) -> None:
        self._path, self._indexes = folder / _NAME, folder / "indexes"

    def read(self) -> Note | None:
        """Read the note of the cache; None where there is none that can be read."""
        try:
            found = json.loads(self._path.read_bytes())
            return Note(*(int(found[name]) for name in Note._fields))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, note: Note) -> None:
        """Write the note, which outlasts a power cut. Errors: OSError."""
        durable.replace(self._path, [json.dumps(note._asdict()).encode()])

    def drop_indexes(self, bank_uid: str = "") -> None:
        """Remove the files of the index of a bank, of which the folders' names begin with its uid; "" stands for all
        banks. No index is open yet. Errors: OSError."""
        for path in self._indexes.glob(f"{bank_uid}*"):
            shutil.rmtree(path)
        with suppress(FileNotFoundError):
            durable.sync_folder(self._indexes)
