"""Payload files on their way to callers. Owns the rule that the last byte of a tensor is handed on only after its
checksum was compared, and the bound on files that are open at once."""

import errno
import os
import threading
from collections.abc import Sequence

import xxhash

from memory_service.domain.model import Payload, Tensor
from memory_service.storage.base import DamagedError
from memory_service.storage.local.files.objects import check_file, read_all
from memory_service.storage.local.files.opening import opener

# By all answers together; the files beyond it are opened when their turn comes.
MOST_OPEN = 512


class OpenFiles:
    """A count that does not pass its bound."""

    def __init__(self, most: int = MOST_OPEN) -> None:
        self._left = most
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """One more, if there is room for it."""
        with self._lock:
            if not self._left:
                return False
            self._left -= 1
            return True

    def leave(self) -> None:
        """One less."""
        with self._lock:
            self._left += 1


class OpenPayload:
    """Reads the tensors of one payload in order, verifying each. Held open, so that it outlives its name."""

    def __init__(self, path: str, payload: Payload, open_files: OpenFiles) -> None:
        """Errors: DamagedError for a file of another length or header, FileNotFoundError."""
        self.length = payload.length
        self._path = path
        self._seed = payload.seed
        self._runs = _runs(payload.tensors)
        self._tensors = iter([tensor for tensor in payload.tensors if tensor.length])
        self._tensor: Tensor | None = next(self._tensors, None)
        # Of the tensor that is being read, in pieces.
        self._hash: xxhash.xxh3_64 | None = None
        self._read = 0
        self._open_files = open_files
        self._descriptor: int | None = None
        kept = open_files.enter()
        try:
            self._descriptor = self._open()
            check_file(self._descriptor, payload)
        except BaseException:
            self._let_go(kept)
            raise
        if not kept:
            self._let_go(kept)

    def _open(self) -> int:
        try:
            return opener(os.fspath(self._path), os.O_RDONLY)
        except OSError as error:
            # A link is none of ours.
            raise DamagedError("it is a link") if error.errno == errno.ELOOP else error from None

    def fill(self, room: memoryview) -> int:
        """Read on, into the beginning of `room`; how many bytes, and 0 at the end.

        Errors: DamagedError at the end of a tensor that does not match, FileNotFoundError.
        """
        if not self._runs:
            return 0
        begin, end = self._runs[0]
        count = min(len(room), end - begin)
        room = room[:count]
        if self._descriptor is not None:
            found = read_all(self._descriptor, room, begin)
        else:
            with open(self._path, "rb", buffering=0) as file:
                found = read_all(file.fileno(), room, begin)
        if found < count:
            raise DamagedError("it ends early")
        self._runs[0] = (begin + count, end)
        if begin + count == end:
            del self._runs[0]
        self._verify(room)
        return count

    def close(self) -> None:
        """Let the file go; a second call does nothing."""
        if self._descriptor is not None:
            self._let_go(True)

    def _let_go(self, kept: bool) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if kept:
            self._open_files.leave()

    def __del__(self) -> None:
        """For those whose caller went before he got them."""
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
    """(begin, end) in the file, where neighbours are one."""
    runs: list[tuple[int, int]] = []
    for tensor in tensors:
        end = tensor.offset + tensor.length
        if runs and runs[-1][1] == tensor.offset:
            runs[-1] = (runs[-1][0], end)
        elif tensor.length:
            runs.append((tensor.offset, end))
    return runs
