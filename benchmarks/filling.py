"""Fills a bank with many chunks without as many writes, because a million writes would take longer than all rows
together: a thousand go through the service, the rest are copies that are made in its database while it is stopped."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.material import Vectors
from memory_service.storage.chunks import row_checksum

_TABLES = ("chunks", "contents")
# The columns of a chunk's row that its checksums cover, and `digest`, which has the checksums.
_CHECKED = (
    "digest",
    "key",
    "token_ids",
    "text",
    "payload",
    "embedding",
    "chunk_id",
    "bank_id",
    "start",
    "original_length",
    "stored_length",
    "payload_bytes",
    "created",
    "meta",
)


def multiply(path: Path, times: int, vectors: Vectors | None = None) -> None:
    """Copy each chunk in the database `path`, so that there are `times` of it with different ids and keys.

    vectors: embeddings [chunks * times, d] in the order of the ids; without them a copy has the embedding of its
    original.
    """
    copies = "WITH RECURSIVE copy (number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM copy WHERE number < ?)"
    with closing(sqlite3.connect(path)) as database, database:
        (stride,) = database.execute("SELECT next_chunk_id FROM store").fetchone()
        originals = [row[0] for row in database.execute("SELECT chunk_id FROM chunks ORDER BY chunk_id")]
        for table in _TABLES:
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            new = {"chunk_id": f"chunk_id + {stride} * number", "key": "randomblob(16)"}
            if vectors is not None and table == "contents":
                new = {"chunk_id": "?", "embedding": "?"}
                values = ", ".join(new.get(column, f'"{column}"') for column in columns)
                statement = f"INSERT INTO contents SELECT {values} FROM contents WHERE chunk_id = ?"
                database.executemany(statement, _with_vectors(columns, originals, stride, vectors))
                continue
            values = ", ".join(new.get(column, f'"{column}"') for column in columns)
            database.execute(f"INSERT INTO {table} {copies} SELECT {values} FROM {table}, copy", (times - 1,))
        _add_checksums(database, stride)
        keys = "SELECT bank_id, key, chunk_id FROM chunks WHERE chunk_id > ? ORDER BY bank_id, key"
        database.execute(f"INSERT INTO keys (bank_id, key, chunk_id) {keys}", (stride,))
        usage = ", ".join(f"{name} = {name} * :times" for name in ("chunks", "tokens", "chunks_written"))
        database.execute(f"UPDATE banks SET {usage}", {"times": times})
        database.execute("UPDATE store SET next_chunk_id = next_chunk_id * ?", (times + 1,))


def _add_checksums(database: sqlite3.Connection, first: int) -> None:
    """Give the copies, whose ids are above `first`, the checksums of their rows; reads refuse rows without them."""
    database.create_function("with_checksums", len(_CHECKED), _with_checksums, deterministic=True)
    rows = f"SELECT chunk_id AS id, {', '.join(_CHECKED)} FROM chunks JOIN contents USING (chunk_id)"
    made = f"SELECT id, with_checksums({', '.join(_CHECKED)}) AS made FROM ({rows} WHERE chunk_id > ?)"
    database.execute(f"UPDATE chunks SET digest = made FROM ({made}) WHERE chunk_id = id", (first,))


def _with_checksums(*values: Any) -> bytes:
    row = dict(zip(_CHECKED, values, strict=True))
    return row_checksum.with_checksums(row_checksum.digest_of(row["digest"]), row)


def _with_vectors(
    columns: list[str], originals: list[int], stride: int, vectors: Vectors
) -> Iterator[tuple[object, object, int]]:
    """Yield for each copy the values of its row: id and embedding, in the order of the columns, then the id of its
    original."""
    swapped = columns.index("embedding") < columns.index("chunk_id")
    for number in range(len(originals), len(vectors)):
        copy, original = divmod(number, len(originals))
        new = (originals[original] + stride * copy, vectors[number].tobytes())
        yield (*(reversed(new) if swapped else new), originals[original])
