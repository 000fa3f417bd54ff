"""How small payload files get onto the disk after their chunks were acknowledged. This file owns that the bytes of a
file leave the records only when the file is synced, and that a file which a power cut has taken is made again of them.

A chunk's way: its file is made, unsynced; its row and the bytes of the file are committed together, and the write is
acknowledged; a second later the disk is synced as a whole, and the bytes go.
"""

import logging
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy.exc import DBAPIError

from memory_service.domain.limits import Limits
from memory_service.storage.local.files.objects import LocalObjects
from memory_service.storage.local.files.unsynced import Recorded, Unsynced
from memory_service.storage.local.files.whole_disk import WholeDisks
from memory_service.storage.local.records import unsynced_rows
from memory_service.storage.local.records.records import Records

Files = Mapping[int, Recorded]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Syncing:
    """Syncs the small files of a data folder. Threads share it."""

    records: Records
    objects: LocalObjects
    unsynced: Unsynced
    disks: WholeDisks
    limits: Limits
    _making: threading.Lock = field(default_factory=threading.Lock)

    def resume(self) -> None:
        """Take over what a process before this one has not synced, and make those files again. What fails is left to
        `run`. Errors: those of a database that cannot be read."""
        with self.records.read() as connection:
            found = unsynced_rows.named(connection)
        if not found:
            return
        self.unsynced.inherit({each.chunk_id: Recorded(each.uid, each.length, inherited=True) for each in found})
        try:
            self.run()
        except (OSError, DBAPIError, sqlite3.Error) as error:
            _log.error("the payload files of %d chunks are not made again yet: %s", len(found), error)

    def run(self) -> None:
        """Sync the files whose bytes are in the records by now, and let the bytes go. Files of a bank whose disk is
        missing are left to a later run, and so is what fails. Errors: OSError, those of the database."""
        recorded = self.unsynced.recorded()
        if there := self._there(recorded):
            inherited = {chunk_id: file for chunk_id, file in there.items() if file.inherited}
            if made := self._make_again(inherited, synced=False):
                _log.info("made the payload files of %d chunks again, which were not synced before a stop", len(made))
            try:
                self._sync_disks(there)
            except OSError:
                self._make_again(there, synced=True)  # one by one
            # A disk that went meanwhile was not synced.
            self._remove_bytes(self._there(there))
        if away := recorded.keys() - there.keys():
            with self.records.read() as connection:
                self.unsynced.forget(away - unsynced_rows.among(connection, away))

    def mend(self, bank_uid: str, chunk_ids: Collection[int]) -> list[int]:
        """Make the files of chunks again that are not as the bytes in the records say, durably; return the ids of
        those. Errors: OSError, NotThereError, those of the database."""
        recorded = self.unsynced.recorded()
        files = {chunk_id: recorded[chunk_id] for chunk_id in chunk_ids if chunk_id in recorded}
        return self._make_again(files, synced=True, where_they_differ=True) if files else []

    def _there(self, files: Files) -> dict[int, Recorded]:
        """Return the files of those banks whose folders are there."""
        banks = {uid for uid in {file.bank_uid for file in files.values()} if self.objects.there(uid)}
        return {chunk_id: file for chunk_id, file in files.items() if file.bank_uid in banks}

    def _sync_disks(self, files: Files) -> None:
        self.disks.sync(self.objects.folders.of(uid) for uid in {file.bank_uid for file in files.values()})

    def _make_again(self, files: Files, *, synced: bool, where_they_differ: bool = False) -> list[int]:
        """Make files of their bytes in the records, and return the ids of those that were made. synced: whether each is
        durable then. where_they_differ: whether those are left that have these bytes. Errors: OSError, NotThereError,
        those of the database."""
        made: list[int] = []
        with self._making:  # two threads would make one file under one temporary name
            for some in self._steps(files):
                with self.records.read(to_the_end=True) as connection:
                    found = list(unsynced_rows.files(connection, some))
                for chunk_id, data in found:
                    uid = files[chunk_id].bank_uid
                    if data is None:
                        _log.error(
                            "the bytes of chunk %d in the records are damaged; its file stays as it is", chunk_id
                        )
                    elif not (where_they_differ and self.objects.has(uid, chunk_id, data)):
                        self.objects.make_again(uid, chunk_id, data, synced=synced)
                        made.append(chunk_id)
                self._remove_those_without_chunk(files, some)
        return made

    def _remove_those_without_chunk(self, files: Files, made: Collection[int]) -> None:
        """Remove the files of chunks that went while their files were made again: a removal before that has found
        nothing to remove."""
        with self.records.read(to_the_end=True) as connection:
            gone = set(made) - unsynced_rows.chunks_among(connection, made)
        for chunk_id in gone:
            self.objects.delete(files[chunk_id].bank_uid, [chunk_id])

    def _remove_bytes(self, files: Iterable[int]) -> None:
        """Remove the bytes of files that are synced from the records."""
        for some in self._steps(files):
            self.records.change(partial(unsynced_rows.delete, chunk_ids=some))
            self.unsynced.forget(some)

    def _steps(self, files: Iterable[int]) -> Iterator[list[int]]:
        ids, step = sorted(files), self.limits.step_rows
        return (ids[begin : begin + step] for begin in range(0, len(ids), step))
