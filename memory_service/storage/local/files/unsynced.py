"""Small payload files that are made without a wait for the disk. This file owns which files those are, and where the
bytes of each are from the making of the file until the file is synced: here until they are in the records, with which
they become durable; then in the records (`records.unsynced_rows`), until `syncing` has synced the file.

To sync a file and its folder takes two waits for the disk, while the bytes of many small files, and the rows of their
chunks, become durable with one.
"""

import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from memory_service.storage.local.files.whole_disk import WholeDisks

# The largest file, header and tensors, whose bytes are written twice: to the records and into the file.
_LARGEST = 24 * 1024


class Recorded(NamedTuple):
    """A file whose bytes are in the records. inherited: whether a process before this one has made it, so that it may
    be lost or torn."""

    bank_uid: str
    length: int
    inherited: bool = False


class Unsynced:
    """The small files of a data folder that may not be on the disk yet. Threads share it."""

    def __init__(self, most: int, disks: WholeDisks) -> None:
        """Begin without any file. most: the bytes of all files together; one beyond them is synced by who makes it, as
        where a disk fails and nothing is synced in the background. disks: syncs the disks of the files."""
        self._most, self._disks = most, disks
        self._lock = threading.Lock()
        # The bytes of files whose chunks are not in the records yet, by chunk id.
        self._held: dict[int, bytes] = {}
        self._recorded: dict[int, Recorded] = {}
        self._bytes = 0

    def takes(self, length: int, folder: str) -> bool:
        """Tell whether a file of this length may be made in a folder without being synced."""
        return length <= _LARGEST and self._bytes + length <= self._most and self._disks.trusts(folder)

    def hold(self, chunk_id: int, file: bytes) -> None:
        """Keep the bytes of a file that was made, until `let_go`."""
        with self._lock:
            self._held[chunk_id] = file
            self._bytes += len(file)

    def held(self, chunk_ids: Iterable[int]) -> dict[int, bytes]:
        """Return the bytes of files that belong into the records with their chunks; those that are synced have none."""
        return {chunk_id: file for chunk_id in chunk_ids if (file := self._held.get(chunk_id)) is not None}

    def let_go(self, bank_uid: str, chunk_id: int, *, recorded: bool) -> None:
        """Let go of the bytes of a file. recorded: whether they are in the records now, durably; otherwise its chunk is
        not there, and the file goes."""
        with self._lock:
            if (file := self._held.pop(chunk_id, None)) is None:
                return
            if recorded:
                self._recorded[chunk_id] = Recorded(bank_uid, len(file))
            else:
                self._bytes -= len(file)

    def inherit(self, files: Mapping[int, Recorded]) -> None:
        """Take over the files, by chunk id, whose bytes a process before this one has left in the records."""
        with self._lock:
            self._recorded |= files
            self._bytes += sum(file.length for file in files.values())

    def recorded(self) -> dict[int, Recorded]:
        """Return the files whose bytes are in the records, by chunk id."""
        with self._lock:
            return dict(self._recorded)

    def forget(self, chunk_ids: Iterable[int]) -> None:
        """Forget files that are synced, or have gone with their chunks."""
        with self._lock:
            for chunk_id in chunk_ids:
                if (file := self._recorded.pop(chunk_id, None)) is not None:
                    self._bytes -= file.length
