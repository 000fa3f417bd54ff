"""Small payload files that are made without a wait for the disk. This file owns which files those are, and where the
bytes of each are from the making of the file until the file is synced: here until they are in the records, with which
they become durable; then in the records (`records.unsynced_rows`), until `syncing` has synced the file.

To sync a file and its folder takes two waits for the disk, while the bytes of many small files, and the rows of their
chunks, become durable with one.
"""

import threading
from collections.abc import Iterable

# The largest file whose bytes are written twice, to the records and into the file: 16 KiB of tensors, and its header.
_LARGEST = 24 * 1024


class Unsynced:
    """The small files of a data folder that may not be on the disk yet. Threads share it."""

    def __init__(self, most: int) -> None:
        """Begin without any file. most: the bytes of all files together; one beyond them is synced by who makes it, as
        where a disk fails and nothing is synced in the background."""
        self._most = most
        self._lock = threading.Lock()
        # The bytes of files whose chunks are not in the records yet, by chunk id.
        self._held: dict[int, bytes] = {}
        # Files whose bytes are in the records: chunk id -> bank uid, and the length of the file.
        self._recorded: dict[int, tuple[str, int]] = {}
        self._bytes = 0

    def takes(self, length: int) -> bool:
        """Tell whether a file of this length may be made without being synced."""
        return length <= _LARGEST and self._bytes + length <= self._most

    def hold(self, chunk_id: int, file: bytes) -> None:
        """Keep the bytes of a file that was made, until `settle`."""
        with self._lock:
            self._held[chunk_id] = file
            self._bytes += len(file)

    def held(self, chunk_ids: Iterable[int]) -> dict[int, bytes]:
        """Return the bytes of files that belong into the records with their chunks; those that are synced have none."""
        return {chunk_id: file for chunk_id in chunk_ids if (file := self._held.get(chunk_id)) is not None}

    def settle(self, bank_uid: str, chunk_id: int, *, recorded: bool) -> None:
        """Let go of the bytes of a file. recorded: whether they are in the records now, durably; otherwise its chunk is
        not there, and the file goes."""
        with self._lock:
            if (file := self._held.pop(chunk_id, None)) is None:
                return
            if recorded:
                self._recorded[chunk_id] = (bank_uid, len(file))
            else:
                self._bytes -= len(file)

    def recorded(self) -> dict[int, str]:
        """Return the bank uid of each file whose bytes are in the records, by chunk id."""
        with self._lock:
            return {chunk_id: bank_uid for chunk_id, (bank_uid, _) in self._recorded.items()}

    def forget(self, chunk_ids: Iterable[int]) -> None:
        """Let go of files that are synced, or have gone with their chunks."""
        with self._lock:
            for chunk_id in chunk_ids:
                _, length = self._recorded.pop(chunk_id, ("", 0))
                self._bytes -= length
