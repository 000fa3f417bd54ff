"""The ids of chunks. This file owns the rule that no id is used twice, whatever happens to the database: ids come from
blocks that are reserved durably before one of them is used, in a small file of their own and in the database, also
where commits are not durable otherwise."""

import threading
from concurrent.futures import Future
from pathlib import Path

import xxhash
from sqlalchemy import Connection, select, update

from kvbank.files import durable
from memory_service.storage.local.records.tables import STORE
from memory_service.storage.local.records.writer import Writer

BLOCK = 1024


class Reservations:
    """The file of reserved ids; it has the first id that is not reserved, and a checksum. Errors: OSError."""

    NAME = "chunk-ids"

    def __init__(self, data: Path) -> None:
        self._path = data / self.NAME

    def read(self) -> int | None:
        """Read the first id that is not reserved; None where there is no file, as in a folder of an earlier version.
        Errors: ValueError for a damaged file."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        number, _, checksum = data.partition(b" ")
        if checksum != _checksum(number):
            raise ValueError(f"{self._path} is damaged")
        return int(number)

    def write(self, end: int) -> None:
        """Reserve all ids below `end`, durably."""
        number = str(end).encode()
        durable.replace(self._path, [number + b" " + _checksum(number)])


def _checksum(number: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(number).encode() + b"\n"


class ChunkIds:
    """Gives ids, which ascend, are never given twice and are below 2^63. All ids below `first` may have been given by
    earlier processes; those from it on are given by this one."""

    def __init__(self, writer: Writer, reservations: Reservations) -> None:
        self._writer = writer
        self._reservations = reservations
        self._lock = threading.Lock()
        self._blocks: list[range] = []
        self._refill: Future[range] | None = None
        self.first = self.refill().result().start

    def take(self) -> int | None:
        """Return the next id; None when a `refill` must be awaited first. Never blocks."""
        with self._lock:
            if not self._blocks:
                return None
            block = self._blocks[0]
            self._blocks[:1] = [block[1:]] if len(block) > 1 else []
        if len(block) < BLOCK // 2:
            self.refill()
        return block[0]

    def refill(self) -> "Future[range]":
        """Reserve one more block, unless more than one is at hand or under way."""
        with self._lock:
            if self._refill is None or (self._refill.done() and len(self._blocks) < 2):
                self._refill = self._writer.submit(self._reserve, self._extend, durable=True)
            return self._refill

    def _reserve(self, connection: Connection) -> range:
        begin = connection.execute(select(STORE.c.next_chunk_id)).scalar_one()
        # The file first: it may say more than the database, which a log that is cut takes back, and never less.
        self._reservations.write(begin + BLOCK)
        connection.execute(update(STORE).values(next_chunk_id=begin + BLOCK))
        return range(begin, begin + BLOCK)

    def _extend(self, block: range) -> None:
        with self._lock:
            self._blocks.append(block)
