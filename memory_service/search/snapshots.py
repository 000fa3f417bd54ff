"""Segments in files, so that a restart does not read every embedding. This file owns their format; a file that is
damaged, foreign or not there costs a rebuild of its rows and nothing else.

indexes/<bank uid>/<sequence>.segment: magic, length of the header, header (JSON), the segment's parts, xxh3-64 of all
before. A file is written once and holds ids with their vectors; an id is never given to another vector. What lives is
for the records to say, so a file that is older than they are, or newer after a power cut, is as good.
"""

import json
import logging
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from kvbank.files import durable, private
from kvbank.files.opening import free_bytes, opener
from memory_service.domain.limits import INDEX, IndexLimits
from memory_service.search.index import tail_rows
from memory_service.search.ivf import Ivf
from memory_service.search.segments import Flat, Half, Ids, Segment

SUFFIX = ".segment"
_MAGIC = b"KVBIDX1\n"
_LARGEST_HEADER = 64 * 1024 * 1024
# Bytes that are read, and then hashed, at a time.
_PIECE = 1024 * 1024
_log = logging.getLogger(__name__)


class UnusableError(Exception):
    """The error of a file that is not a whole snapshot of its bank."""


@dataclass(frozen=True, slots=True)
class Snapshots:
    """The snapshots of the index of one bank, in a folder of their own."""

    folder: Path
    store_id: str
    dimension: int
    min_free: int
    durable: bool
    limits: IndexLimits = INDEX

    def save(self, segment: Segment) -> bool:
        """Write a segment as it is, in the place of its earlier file. Returns False where that was not possible, which
        is logged."""
        old = segment.file
        try:
            self._make_folder()
            if free_bytes(self.folder) - segment.memory < self.min_free:
                raise OSError("less than min_free would be left")
            path = self.folder / f"{max([0, *(number for number, _ in self._numbered())]) + 1:08d}{SUFFIX}"
            rows = self._write(path, segment)
        except OSError as error:
            _log.warning("no snapshot in %s: %s", self.folder, error)
            return False
        segment.file, segment.saved = path, rows
        if old is not None:
            _remove(old)
        return True

    def forget(self, segment: Segment) -> None:
        """Remove the file of a segment whose rows are in another file."""
        if segment.file is not None:
            _remove(segment.file)

    def load(self) -> Iterator[Segment]:
        """Yield all segments, the newest file first; files that cannot be used are logged and removed."""
        for temporary in self.folder.glob("*.tmp"):
            _remove(temporary)
        for _, path in sorted(self._numbered(), reverse=True):
            try:
                segment = self.read(path)
            except (OSError, UnusableError) as error:
                _log.warning("snapshot %s is not used: %s", path, error)
                _remove(path)
                continue
            segment.file, segment.saved = path, segment.rows
            yield segment

    def moved(self) -> "Snapshots":
        """Let the bank have no files any more, and return those that it had, which are to be dropped."""
        gone = self.folder.with_name(f"{self.folder.name}.{secrets.token_hex(8)}.gone")
        try:
            self.folder.rename(gone)
        except OSError:  # it has none, most often
            return self
        return replace(self, folder=gone)

    def drop(self) -> None:
        """Remove all files of the bank."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def any(self) -> bool:
        """Tell whether the bank has files."""
        return next(self.folder.glob("*"), None) is not None

    def _numbered(self) -> list[tuple[int, Path]]:
        paths = self.folder.glob(f"*{SUFFIX}")
        return [(int(path.stem), path) for path in paths if path.stem.isdecimal()]

    def _make_folder(self) -> None:
        if self.durable:
            durable.make_folder(self.folder)
        else:
            private.make_folder(self.folder)

    def _write(self, path: Path, segment: Segment) -> int:
        """Write a segment to a file, and return how many rows that has."""
        parts = list(segment.parts())
        header = segment.header() | {"store": self.store_id, "bank": self.folder.name, "dimension": self.dimension}
        # A segment that grows may have more rows by now than these parts.
        header["rows"] = parts[0].nbytes // 8
        text = json.dumps(header).encode()
        begin = (_MAGIC, struct.pack("<Q", len(text)), text)
        durable.replace(path, _digested([*begin, *parts]), sync="name" if self.durable else "nothing")
        return int(header["rows"])

    def read(self, path: Path) -> Segment:
        """Read a segment from a file. Errors: UnusableError, OSError."""
        with open(path, "rb", buffering=0, opener=opener) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnusableError("it is no file")
            digest = xxhash.xxh3_64()
            begin = _take(file, len(_MAGIC) + 8, digest)
            size = struct.unpack("<Q", begin[len(_MAGIC) :])[0]
            if begin[: len(_MAGIC)] != _MAGIC or size > _LARGEST_HEADER:
                raise UnusableError("it is not a snapshot")
            segment = self._made(_take(file, size, digest), os.fstat(file.fileno()).st_size)
            for part in segment.parts():
                _fill(file, part, digest)
            if file.read(9) != struct.pack("<Q", digest.intdigest()):
                raise UnusableError("its checksum is wrong")
        return segment

    def _made(self, text: bytes, size: int) -> Segment:
        """Make an empty segment of the size that a header says. size: that of the file, in bytes. Errors:
        UnusableError."""
        try:
            header: dict[str, Any] = json.loads(text)
            if (header["store"], header["bank"], header["dimension"]) != (
                self.store_id,
                self.folder.name,
                self.dimension,
            ):
                raise UnusableError("it is of another store or bank")
            # Before memory is taken for what a damaged header says.
            if not 0 <= header["rows"] * self.dimension * 2 <= size:
                raise UnusableError("it is too short")
            segment = _segment(header, self.dimension, self.limits)
            segment.largest, segment.error = float(header["largest"]), float(header["error"])
        except (ValueError, KeyError, TypeError) as error:
            raise UnusableError("its header is damaged") from error
        return segment


def _digested(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the parts of a snapshot, and behind them their checksum."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
        yield part
    yield struct.pack("<Q", digest.intdigest())


def _segment(header: dict[str, Any], dimension: int, limits: IndexLimits) -> Segment:
    rows, kind = int(header["rows"]), header["kind"]
    ids = np.zeros(rows, np.int64)
    if kind == "flat":
        flat = Flat(dimension, max(rows, tail_rows(dimension, limits)))
        flat.fill(rows)
        return flat
    if kind == "half":
        return Half(dimension, ids)
    sizes = [int(size) for size in header["sizes"]]
    if kind != "ivf" or sum(sizes) != rows or min(sizes) < 0 or not sizes:
        raise UnusableError("its header is damaged")
    ivf = Ivf(dimension, ids, np.zeros((len(sizes), dimension), np.float32), sizes)
    ivf.trained, ivf.probes, ivf.recall = int(header["trained"]), int(header["probes"]), float(header["recall"])
    return ivf


def _remove(path: Path) -> None:
    """Remove a file, or log that it cannot be removed, such as a folder that a person has put there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s cannot be removed: %s", path, error)


def ids_in(path: Path, store_id: str) -> Ids:
    """Return the ids in a file; none where the file is no whole snapshot of this store."""
    try:
        with open(path, "rb", opener=opener) as file:
            file.seek(len(_MAGIC))
            (size,) = struct.unpack("<Q", file.read(8))
            dimension = int(json.loads(file.read(min(size, _LARGEST_HEADER)))["dimension"])
        segment = Snapshots(path.parent, store_id, dimension, min_free=0, durable=False).read(path)
    except (OSError, UnusableError, struct.error, ValueError, KeyError, TypeError):
        return np.empty(0, np.int64)
    return segment.ids[: segment.rows]


def largest_id(folder: Path, store_id: str) -> int:
    """Return the largest id in the snapshots of all banks, 0 where there is none. Snapshots that are damaged, or of
    another store, are left out."""
    found = (ids_in(path, store_id) for path in folder.glob(f"*/*{SUFFIX}"))
    return max((int(np.max(ids, initial=0)) for ids in found), default=0)


def _take(file: BinaryIO, size: int, digest: xxhash.xxh3_64) -> bytes:
    data = bytearray(size)
    _fill(file, memoryview(data), digest)
    return bytes(data)


def _fill(file: BinaryIO, part: memoryview, digest: xxhash.xxh3_64) -> None:
    """Read a part from a file. It is hashed in pieces, which the processor still has in its cache."""
    while part:
        count = file.readinto(part[:_PIECE])  # type: ignore[attr-defined]
        if not count:
            raise UnusableError("it is too short")
        digest.update(part[:count])
        part = part[count:]


def drop_unknown(folder: Path, known: Callable[[], set[str]]) -> None:
    """Remove the folders of deleted banks. known: returns the uids of banks; it is called after the folders were
    listed."""
    found = list(folder.glob("*"))
    names = known()
    for path in found:
        if path.is_dir() and path.name not in names:
            shutil.rmtree(path, ignore_errors=True)
