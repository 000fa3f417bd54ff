"""Payloads on their way to callers, out of any engine. This file owns the rule that the last byte of a tensor is handed
on only after its checksum was compared, and the bound on objects that are open at once.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import closing

import xxhash

from memory_service.domain.model import Payload, Tensor
from memory_service.storage.base import DamagedError, Source


class OpenFiles:
    """Counts the objects that all answers together hold open, up to a bound. Threads share it."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Count one object more, and return True, if there is room for it."""
        with self._lock:
            if not self._left:
                return False
            self._left -= 1
            return True

    def leave(self) -> None:
        """Count one object less."""
        with self._lock:
            self._left += 1


class VerifiedPayload:
    """Reads the tensors of one payload in order, and verifies each.

    Its object is held open where the bound has room for it, so that it can be read also after it was deleted; else it
    is opened for each piece.
    """

    def __init__(self, open_source: Callable[[], Source], payload: Payload, open_files: OpenFiles) -> None:
        """Open the object of a payload. payload: the descriptor, which may be cut to some tensors. Errors: those of
        `open_source`, which are DamagedError and FileNotFoundError."""
        self.length = payload.length
        self._open_source = open_source
        self._seed = payload.seed
        self._runs = _runs(payload.tensors)
        self._tensors = iter([tensor for tensor in payload.tensors if tensor.length])
        self._tensor: Tensor | None = next(self._tensors, None)
        # A tensor may be read in pieces: the checksum of what was read of it, and how many bytes that is.
        self._hash: xxhash.xxh3_64 | None = None
        self._read = 0
        self._open_files = open_files
        self._source: Source | None = None
        kept = open_files.enter()
        try:
            source = open_source()
        except BaseException:
            if kept:
                open_files.leave()
            raise
        if kept:
            self._source = source
        else:
            source.close()

    def fill(self, room: memoryview) -> int:
        """Read on, into the beginning of `room`; return how many bytes that are, 0 at the end.

        Errors: DamagedError at the end of a tensor that does not match, FileNotFoundError.
        """
        if not self._runs:
            return 0
        begin, end = self._runs[0]
        count = min(len(room), end - begin)
        room = room[:count]
        if self._source is not None:
            found = self._source.read_at(room, begin)
        else:
            with closing(self._open_source()) as source:
                found = source.read_at(room, begin)
        if found < count:
            raise DamagedError("it ends early")
        self._runs[0] = (begin + count, end)
        if begin + count == end:
            del self._runs[0]
        self._verify(room)
        return count

    def close(self) -> None:
        """Let the object go; a second call does nothing."""
        source, self._source = self._source, None
        if source is not None:
            source.close()
            self._open_files.leave()

    def __del__(self) -> None:
        """Let the object go where the caller of the answer went before the answer was made."""
        self.close()

    def _verify(self, view: memoryview) -> None:
        while view:
            tensor = self._tensor
            assert tensor is not None
            part = view[: tensor.length - self._read]
            view = view[len(part) :]
            self._read += len(part)
            if len(part) == tensor.length:
                self._compare(tensor, xxhash.xxh3_64_intdigest(part, self._seed))
                continue
            self._hash = self._hash or xxhash.xxh3_64(seed=self._seed)
            self._hash.update(part)
            if self._read == tensor.length:
                self._compare(tensor, self._hash.intdigest())

    def _compare(self, tensor: Tensor, checksum: int) -> None:
        if checksum != tensor.checksum:
            raise DamagedError(f"tensor {tensor.name} does not match its checksum")
        self._tensor, self._hash, self._read = next(self._tensors, None), None, 0


def _runs(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return (begin, end) of the bytes of tensors in their object, with neighbours as one."""
    runs: list[tuple[int, int]] = []
    for tensor in tensors:
        end = tensor.offset + tensor.length
        if runs and runs[-1][1] == tensor.offset:
            runs[-1] = (runs[-1][0], end)
        elif tensor.length:
            runs.append((tensor.offset, end))
    return runs
