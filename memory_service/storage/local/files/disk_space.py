"""Room on the disks. This file owns the rule that writes of new data leave `min_free` bytes, on the disk of the records
and on that of the payloads, which may be another, so that deletes, evictions and checkpoints still work. Writers that
look at the same time do not count on the same bytes: each reserves what it is about to write."""

import os
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType

from kvbank.files.opening import free_bytes
from memory_service.domain.errors import ServiceError
from memory_service.storage.local.files import layout


class Reservation:
    """Bytes of a disk that a writer is about to write. It ends with `give`, or with the block."""

    def __init__(self, space: "DiskSpace", disk: int, size: int) -> None:
        self._space, self._disk, self._size = space, disk, size

    def give(self) -> None:
        """End the reservation, because the bytes are written, or will not be. A second call does nothing."""
        self._space.give(self._disk, self._size)
        self._size = 0

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give()


class DiskSpace:
    """Reserves bytes on the disks of a data folder. Threads may share this. Errors: OSError where a disk cannot be
    asked."""

    def __init__(self, data: Path, min_free: int) -> None:
        # No Path, because each write asks for both.
        self._data, self._payloads, self._min_free = os.fspath(data), os.fspath(data / layout.FOLDER), min_free
        self._lock = threading.Lock()
        # The bytes that are reserved, by the number of the device.
        self._reserved: Counter[int] = Counter()

    def for_records(self, size: int = 0) -> Reservation:
        """Reserve bytes on the disk that has the database. Errors: DISK_FULL."""
        return self._reserve(self._data, size)

    def for_payload(self, size: int) -> Reservation:
        """Reserve bytes on the disk that has the payloads. Errors: DISK_FULL."""
        return self._reserve(self._payloads, size)

    def free(self) -> int:
        """Return the bytes that are free on the disk that has the database. Errors: OSError."""
        return free_bytes(self._data)

    def give(self, disk: int, size: int) -> None:
        """Take back bytes that were reserved on a disk. `Reservation` calls this."""
        with self._lock:
            self._reserved[disk] -= size

    def _reserve(self, folder: str, size: int) -> Reservation:
        with self._lock:
            disk = os.stat(folder).st_dev
            free = free_bytes(folder) - self._reserved[disk]
            if free - size < self._min_free:
                text = f"{free} bytes are free in {os.path.basename(folder)}, {self._min_free} are kept back"
                raise ServiceError("DISK_FULL", text, free=max(free, 0), min_free=self._min_free)
            self._reserved[disk] += size
        return Reservation(self, disk, size)
