"""The rows of small payload files that may not be on the disk yet. A function that changes them runs in a transaction
of the writer, one that only reads also in that of a reader."""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import xxhash
from sqlalchemy import Connection

from memory_service.storage.local.records.schema import raw

_OF = "chunk_id IN (SELECT value FROM json_each(?))"
_NAMED = "SELECT chunk_id, uid, length(file) FROM unsynced JOIN chunks USING (chunk_id) JOIN banks USING (bank_id)"


class File(NamedTuple):
    """The bytes of the file of a chunk; None where the row is damaged."""

    chunk_id: int
    data: bytes | None


class Named(NamedTuple):
    """A file by its chunk, the uid of its bank, and its length."""

    chunk_id: int
    uid: str
    length: int


def insert(connection: Connection, files: Mapping[int, bytes]) -> None:
    """Keep the bytes of files, by chunk id, whose chunks are inserted in this transaction."""
    rows = [(chunk_id, xxhash.xxh3_64_digest(file), file) for chunk_id, file in files.items()]
    raw(connection).executemany("INSERT INTO unsynced (chunk_id, checksum, file) VALUES (?, ?, ?)", rows)


def delete(connection: Connection, chunk_ids: Collection[int]) -> None:
    """Delete the bytes of files that are synced."""
    raw(connection).execute(f"DELETE FROM unsynced WHERE {_OF}", (json.dumps(list(chunk_ids)),))


def named(connection: Connection) -> list[Named]:
    """Read what files there are; those of banks that are being deleted are left out."""
    return list(map(Named._make, raw(connection).execute(_NAMED).fetchall()))


def files(connection: Connection, chunk_ids: Collection[int]) -> Iterator[File]:
    """Read the files of chunks, as far as there are rows of them."""
    statement = f"SELECT chunk_id, CAST(checksum AS BLOB), CAST(file AS BLOB) FROM unsynced WHERE {_OF}"
    for chunk_id, checksum, file in raw(connection).execute(statement, (json.dumps(list(chunk_ids)),)):
        yield File(chunk_id, file if xxhash.xxh3_64_digest(file) == checksum else None)


def among(connection: Connection, chunk_ids: Collection[int]) -> set[int]:
    """Return those of some chunks of whose files there are rows."""
    found = raw(connection).execute(f"SELECT chunk_id FROM unsynced WHERE {_OF}", (json.dumps(list(chunk_ids)),))
    return {chunk_id for (chunk_id,) in found}


def chunks_among(connection: Connection, chunk_ids: Collection[int]) -> set[int]:
    """Return those of some ids of which there is a chunk."""
    found = raw(connection).execute(f"SELECT chunk_id FROM chunks WHERE {_OF}", (json.dumps(list(chunk_ids)),))
    return {chunk_id for (chunk_id,) in found}
