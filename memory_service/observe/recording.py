"""What happens to chunks is recorded here, where an operator asks for that; `kvbank.files.traces` says what stands in
such a trace. This file owns the rule that no call waits for the trace: events wait in memory for a thread that appends
them to the file, and where that cannot be written, the recording ends with one warning, and the service goes on.
"""

import logging
import os
import queue
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from kvbank.files import locks, private, traces
from memory_service.domain.errors import StartError

# Numbers that may wait for the disk (64 MB); the events beyond them are counted as lost.
_MOST_WAITING = 1 << 20
# Events that are written together.
_LARGEST_BATCH = 1024
# Chunks in one line that says what has gone: no reader takes a line without end.
_MOST_GONE = 100_000
_log = logging.getLogger(__name__)


class Recorder:
    """Records events of the banks of a service. Threads may share it; until `begin`, and after `end`, it does
    nothing."""

    def __init__(self, most_waiting: int = _MOST_WAITING) -> None:
        """Begin with no file. most_waiting: the numbers in events that wait for the disk."""
        self._most_waiting = most_waiting
        self._file: _TraceFile | None = None
        self._store = ""
        self._queue: queue.SimpleQueue[tuple[traces.Event, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = self._lost = 0
        self._thread: threading.Thread | None = None

    def begin(self, path: Path, store: str, min_free: int) -> None:
        """Append to the trace `path`, which is made where there is none.

        store: the identity of what is stored. min_free: the bytes of the disk that the trace leaves free. Errors:
        StartError for a file that is no trace, cannot be opened, or is another service's.
        """
        try:
            self._file = _TraceFile(path, min_free)
        except OSError as error:
            raise StartError(f"cannot record to {path}: {error.strerror}") from error
        self._store = store
        self._put(traces.Begun(_now(), store), 1)
        self._thread = threading.Thread(target=self._run, name="kvbank-recorder", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Write what waits, and close the file. A second call does nothing."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    @property
    def on(self) -> bool:
        """Tell whether events are recorded now."""
        return self._file is not None

    # Events

    def wrote(self, bank: str, chunk: int, tokens: int, size: int) -> None:
        """Record that a chunk was written. tokens, size: what it takes of a capacity in tokens, and in bytes."""
        if self.on:
            self._put(traces.Wrote(_now(), bank, chunk, tokens, size), 1)

    def retrieved(self, bank: str, queries: Sequence[Sequence[int]]) -> None:
        """Record that a retrieval was counted. queries: the ids of the chunks that each query found in the bank."""
        if self.on:
            found = tuple(map(tuple, queries))
            self._put(traces.Retrieved(_now(), bank, found), 1 + sum(map(len, found)))

    def gone(self, bank: str, chunks: Sequence[int], why: str) -> None:
        """Record that chunks have left a bank. why: deleted, evicted, expired or quarantined."""
        if self.on:
            for at in range(0, len(chunks), _MOST_GONE):
                part = tuple(chunks[at : at + _MOST_GONE])
                self._put(traces.Gone(_now(), bank, part, why), 1 + len(part))

    def dropped(self, bank: str) -> None:
        """Record that a bank was deleted."""
        if self.on:
            self._put(traces.Dropped(_now(), bank), 1)

    def _put(self, event: traces.Event, numbers: int) -> None:
        with self._lock:
            if self._waiting and self._waiting + numbers > self._most_waiting:
                self._lost += 1
                return
            self._waiting += numbers
            self._queue.put((event, numbers))

    # The thread

    def _run(self) -> None:
        more = True
        while more and self._file is not None:
            batch, more = self._take()
            try:
                if batch and not isinstance(batch[0], traces.Begun) and self._file.is_emptied():
                    batch.insert(0, traces.Begun(_now(), self._store))
                self._file.append(b"".join(map(traces.line, batch)))
            except OSError as error:
                _log.warning("the recording to %s ends: %s", self._file.path, error.strerror)
                break
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _take(self) -> tuple[list[traces.Event], bool]:
        """Wait for events, and return those that are there, and whether more may come."""
        batch: list[traces.Event] = []
        numbers, item = 0, self._queue.get()
        while item is not None:
            batch.append(item[0])
            numbers += item[1]
            if len(batch) == _LARGEST_BATCH:
                break
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
        with self._lock:
            self._waiting -= numbers
            lost, self._lost = self._lost, 0
        if lost:
            batch.append(traces.Lost(_now(), lost))
        return batch, item is not None


class _TraceFile:
    """A trace that is open for appending, and locked against other services."""

    def __init__(self, path: Path, min_free: int) -> None:
        """Open or make the file. Errors: StartError, OSError."""
        self.path, self._min_free = path, min_free
        self._descriptor = os.open(
            path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, private.FILE
        )
        try:
            self._is_file = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
            if not locks.take(self._descriptor):
                raise StartError(f"cannot record to {path}: another service does")
            if self._is_file:
                self._go_on()
        except BaseException:
            self.close()
            raise

    def _go_on(self) -> None:
        """End a line that a kill has cut off. Errors: StartError for a file that is no trace."""
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, len(traces.HEAD), 0) != traces.HEAD:
            raise StartError(f"cannot record to {self.path}: it is no trace, and is left alone")
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")

    def is_emptied(self) -> bool:
        """Tell whether somebody has cut the file down to nothing, as logrotate does with `copytruncate`."""
        return self._is_file and os.fstat(self._descriptor).st_size == 0

    def append(self, data: bytes) -> None:
        """Write lines at the end of the file. Errors: OSError, also where the disk would have less than it is to have
        free."""
        if self._is_file:
            disk = os.fstatvfs(self._descriptor)
            if disk.f_bavail * disk.f_frsize < self._min_free + len(data):
                raise OSError(0, "the disk has no more room than is to be left free")
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def close(self) -> None:
        """Close the file, which ends the lock."""
        os.close(self._descriptor)


def _now() -> int:
    return time.time_ns() // 1_000_000
