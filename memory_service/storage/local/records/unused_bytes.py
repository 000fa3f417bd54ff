"""The room in the pages of the database that nothing uses is cleared here, after rows were forgotten.

SQLite overwrites what is deleted (`secure_delete`). But where it moves a row from one page to another, a copy of the
row is left in the room that the first page no longer uses, and stays when the row is forgotten. SQLite clears that room
by VACUUM alone, which keeps all writes waiting until the whole database is copied. So the room is cleared in the file
itself, some pages at a time, while the log is empty and the writer's thread commits nothing. This file owns that
nothing but zeros is written, and nowhere but between the cell pointers and the cells of a page of a B-tree, where no
reader looks (https://www.sqlite.org/fileformat2.html, 1.6 and 1.8).
"""

import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from memory_service.domain.errors import ServiceError
from memory_service.storage.local.records.writer import Writer

# Bytes that are looked at at a time, and pages that are cleared in one turn of the writer's thread: some 20 ms.
_PIECE = 4 * 1024 * 1024
_PAGES = 2000
# The writer's thread waits so long for readers of the log, and is asked again for so long, in seconds.
_WAIT_S, _PATIENCE_S = 0.2, 60.0
# Kinds of pages: those of a B-tree, by the map of pages; of tables and indexes, by the first byte of a page.
_ROOT, _INNER = 1, 5
_INTERIOR, _LEAVES = (2, 5), (10, 13)
# SQLite locks this byte of a file; the page that has it is never used.
_PENDING_BYTE = 1 << 30
_OF_FIRST_PAGE = 100


class _Form(NamedTuple):
    """The form of a database. page: bytes of a page. usable: those of them that SQLite uses. has_map: whether it has a
    map of its pages, as one that gives free pages back."""

    page: int
    usable: int
    has_map: bool

    def map_of(self, number: int) -> int:
        """Return the number of the page that says of which kind a page (from 2) is."""
        covered = self.usable // 5 + 1
        found = (number - 2) // covered * covered + 2
        return found + (found == _PENDING_BYTE // self.page + 1)


class UnusedBytes:
    """Clears what nothing uses in the pages of a database that is open here. One thread at a time calls `clear`."""

    def __init__(self, writer: Writer, path: Path) -> None:
        """Clear the database at `path`, to which `writer` alone writes."""
        self._writer, self._path = writer, path
        # Open until the database is closed: closing a file ends the locks that SQLite has on it in this process.
        self._file: int | None = None

    def clear(self) -> int:
        """Clear all that is unused now, and return in how many pages that was. When this returns, the log is empty of
        all that was committed before. Errors: NOT_SERVING where a reader keeps the log for a minute; OSError."""
        self._with_empty_log(lambda: None)
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        if not self._form().has_map:
            # Of an earlier version, and on a disk that had no room to write it anew when it was upgraded.
            self._writer.vacuum().result()
            self._with_empty_log(lambda: None)
        found = [number for number, _, _ in self._unused()]
        for begin in range(0, len(found), _PAGES):
            self._with_empty_log(partial(self._clear, found[begin : begin + _PAGES]))
        return len(found)

    def close(self) -> None:
        """Let go of the file; the database is closed."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _with_empty_log(self, action: Callable[[], None]) -> None:
        end = time.monotonic() + _PATIENCE_S
        while not self._writer.with_empty_log(action, _WAIT_S).result():
            if time.monotonic() > end:
                text = "a reader keeps what was forgotten in the log of the database, such as a backup; ask again later"
                raise ServiceError("NOT_SERVING", text)
            time.sleep(_WAIT_S)

    def _clear(self, numbers: Sequence[int]) -> None:
        """Clear the unused room of some pages. The writer's thread calls this while the log is empty."""
        assert self._file is not None
        form = self._form()
        for number in numbers:
            page = os.pread(self._file, form.page, (number - 1) * form.page)
            if (room := _unused_of(page, number, form)) is not None:
                os.pwrite(self._file, bytes(room[1] - room[0]), (number - 1) * form.page + room[0])
        os.fsync(self._file)

    def _unused(self) -> Iterator[tuple[int, int, int]]:
        """Yield the number of each page of a B-tree whose unused room is not clear, with the begin and end of that."""
        assert self._file is not None
        form, size = self._form(), os.fstat(self._file).st_size
        kinds, map_number = b"", 0
        step = max(_PIECE // form.page, 1)
        for first in range(1, size // form.page + 1, step):
            piece = os.pread(self._file, step * form.page, (first - 1) * form.page)
            for number in range(first, first + len(piece) // form.page):
                if number > 1:
                    if form.map_of(number) != map_number:
                        map_number = form.map_of(number)
                        kinds = os.pread(self._file, form.page, (map_number - 1) * form.page)
                    at = 5 * (number - map_number - 1)
                    if number <= map_number or at >= form.usable or kinds[at] not in (_ROOT, _INNER):
                        continue
                begin = (number - first) * form.page
                if (room := _unused_of(piece[begin : begin + form.page], number, form)) is not None:
                    yield number, *room

    def _form(self) -> _Form:
        """Read the form of the database."""
        assert self._file is not None
        head = os.pread(self._file, _OF_FIRST_PAGE, 0)
        (page,), (largest_root,) = struct.unpack(">H", head[16:18]), struct.unpack(">I", head[52:56])
        page = 65536 if page == 1 else page
        return _Form(page, page - head[20], largest_root > 0)


def _unused_of(page: bytes, number: int, form: _Form) -> tuple[int, int] | None:
    """Return begin and end of the unused room of a page of a B-tree; None where it is clear, or there is none."""
    head = _OF_FIRST_PAGE if number == 1 else 0
    if page[head] not in (*_INTERIOR, *_LEAVES):
        return None
    cells, end = struct.unpack(">HH", page[head + 3 : head + 7])
    begin = head + (12 if page[head] in _INTERIOR else 8) + 2 * cells
    end = end or 65536
    if not begin < end <= form.usable or not page[begin:end].strip(b"\0"):
        return None
    return begin, end
