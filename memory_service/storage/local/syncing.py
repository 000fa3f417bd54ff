"""How small payload files get onto the disk after their chunks were acknowledged. This file owns that the bytes of a
file leave the records only when the file is synced, and that a start makes every file again that a power cut has taken.

A chunk's way: its file is made, unsynced; its row and the bytes of the file are committed together, and the write is
acknowledged; a second later all files are synced at once, and the bytes go.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from memory_service.domain.limits import Limits
from memory_service.storage.local.files.objects import LocalObjects
from memory_service.storage.local.files.unsynced import Unsynced
from memory_service.storage.local.files.whole_disk import sync_disk
from memory_service.storage.local.records import unsynced_rows
from memory_service.storage.local.records.records import Records

# The uid of the bank of each file, by chunk id.
Files = Mapping[int, str]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Syncing:
    """Syncs the small files of a data folder. One thread at a time calls it."""

    records: Records
    objects: LocalObjects
    unsynced: Unsynced
    limits: Limits

    def run(self) -> None:
        """Sync the files whose bytes are in the records by now, and let the bytes go. What fails is left to the next
        run. Errors: OSError, those of the database."""
        if files := self.unsynced.recorded():
            self._sync(files)
            self._let_go(files)

    def resume(self) -> None:
        """Make those files that an earlier process has not synced, and that are not as they were written; sync all of
        them. Those of a bank whose disk is missing are left to a later start. Errors: OSError, those of the
        database."""
        with self.records.read() as connection:
            named = unsynced_rows.named(connection)
        if files := {chunk_id: uid for chunk_id, uid in named.items() if self.objects.there(uid)}:
            made = sum(self._made_again(files, all_of_them=False))
            self._sync(files)
            self._let_go(files)
            if made:
                _log.warning("made %d payload files again that the disk had lost", made)

    def _sync(self, files: Files) -> None:
        """Make files durable that are as they were written. Where the disk cannot say that it has all of them, each is
        made again and synced by itself. Errors: OSError."""
        try:
            self._sync_disks(files)
        except OSError:
            for _ in self._made_again(files, all_of_them=True):
                pass

    def _sync_disks(self, files: Files) -> None:
        """Sync the disks that have these files, each once. Errors: OSError."""
        # The folder of a bank that was deleted meanwhile has gone; a disk that is missing cannot be synced.
        folders = [self.objects.folders.of(uid) for uid in set(files.values()) if self.objects.there(uid)]
        for folder in {os.stat(folder).st_dev: folder for folder in folders}.values():
            sync_disk(folder)

    def _made_again(self, files: Files, *, all_of_them: bool) -> Iterator[bool]:
        """Make files durably of their bytes in the records, and yield for each whether it was made. all_of_them:
        whether those are made, too, that are there as they were written."""
        for some in self._steps(files):
            with self.records.read() as connection:
                found = list(unsynced_rows.files(connection, some))
            for chunk_id, data in found:
                uid = files[chunk_id]
                if data is None:
                    _log.error("the bytes of chunk %d in the records are damaged; its file is left as it is", chunk_id)
                elif self.objects.there(uid) and (all_of_them or not self.objects.has(uid, chunk_id, data)):
                    self.objects.make_again(uid, chunk_id, data)
                    yield True

    def _let_go(self, files: Files) -> None:
        """Remove the bytes of synced files from the records."""
        for some in self._steps(files):
            self.records.change(partial(unsynced_rows.delete, chunk_ids=some))
            self.unsynced.forget(some)

    def _steps(self, files: Files) -> Iterator[list[int]]:
        ids, step = sorted(files), self.limits.step_rows
        return (ids[begin : begin + step] for begin in range(0, len(ids), step))
