"""Room in the database that nothing uses is cleared: copies of rows that SQLite has moved, and nothing else."""

import random
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection

from memory_service.storage.local.engine import LocalEngine
from memory_service.storage.local.records.schema import raw
from tests.support.engines import opened

ROWS = 1200


def text(number: int) -> bytes:
    """Make the text of a row, of many lengths, which no other row has a part of."""
    return f"<<{number:06d}>>".encode() * (3 + 37 * number % 90)


def change(connection: Connection, numbers: list[int]) -> None:
    """Write rows, and delete most of them in no order while others grow, so that SQLite moves rows."""
    driver, order = raw(connection), random.Random(1)
    driver.execute("CREATE TABLE moved (number INTEGER PRIMARY KEY, text BLOB)")
    driver.executemany("INSERT INTO moved VALUES (?, ?)", ((number, text(number)) for number in range(ROWS)))
    for number in numbers[ROWS // 5 :]:
        driver.execute("DELETE FROM moved WHERE number = ?", (number,))
        if order.random() < 0.3:
            grown = order.choice(numbers[: ROWS // 5])
            driver.execute("UPDATE moved SET text = CAST(text || ? AS BLOB) WHERE number = ?", (text(grown), grown))


def checked(engine: LocalEngine, path: Path, kept: list[int], gone: list[int]) -> None:
    """Check that the rows that are kept are whole, and that nothing of the others is in the file."""
    with engine.records.read() as connection:
        rows = dict(raw(connection).execute("SELECT number, text FROM moved").fetchall())
        assert raw(connection).execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert rows.keys() == set(kept)
    assert all(set(row.split(b">>")[:-1]) == {b"<<%06d" % number} for number, row in rows.items())
    data = path.read_bytes()
    assert [number for number in gone if b"<<%06d>>" % number in data] == []


def test_copies_of_moved_rows_are_cleared(tmp_path: Path) -> None:
    numbers = random.Random(2).sample(range(ROWS), ROWS)
    kept, gone = numbers[: ROWS // 5], numbers[ROWS // 5 :]
    with opened(tmp_path / "data") as engine:
        assert isinstance(engine, LocalEngine)
        engine.records.writer.submit(lambda connection: change(connection, numbers)).result()
        path = tmp_path / "data" / "metadata.db"
        # With the rows that are left, and the copies that SQLite has made of them, nothing more is to be forgotten.
        some, rest = kept[::2], kept[1::2]
        for number in some:
            delete = f"DELETE FROM moved WHERE number = {number}"
            engine.records.writer.submit(lambda connection, delete=delete: raw(connection).execute(delete)).result()
        engine.records.writer.checkpoint().result()
        before = path.read_bytes()
        assert any(b"<<%06d>>" % number in before for number in [*gone, *some]), "SQLite leaves no copies any more"
        assert engine.unused.clear() > 0
        checked(engine, path, rest, [*gone, *some])
        assert engine.unused.clear() <= 2  # those to which the service itself has written since
        # What the writer has read before is not written back.
        engine.records.writer.submit(
            lambda connection: raw(connection).execute("UPDATE moved SET text = text")
        ).result()
        engine.records.writer.checkpoint().result()
        checked(engine, path, rest, [*gone, *some])


def test_a_database_without_a_map_of_its_pages_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "data" / "metadata.db"
    with opened(tmp_path / "data"):
        pass
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA auto_vacuum=NONE")
        database.execute("VACUUM")
    with opened(tmp_path / "data") as engine:
        assert isinstance(engine, LocalEngine)
        numbers = list(range(ROWS))
        engine.records.writer.submit(lambda connection: change(connection, numbers)).result()
        engine.unused.clear()
        checked(engine, path, numbers[: ROWS // 5], numbers[ROWS // 5 :])
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA auto_vacuum").fetchone() == (2,)
