"""The rows of turns; implements `memory_service.storage.sessions.rows.TurnRows`. A function that changes rows runs in a
transaction of the writer, one that only reads also in that of a reader."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from sqlalchemy import Connection

from memory_service.domain.errors import damaged_turn
from memory_service.domain.sessions import Stretch, Turn
from memory_service.domain.validate import LARGEST_INT64
from memory_service.storage.local.records import bytes_rows, session_rows
from memory_service.storage.local.records.schema import raw
from memory_service.storage.local.records.tables import TURNS
from memory_service.storage.sessions import turn_row
from memory_service.storage.sessions.turn_row import BLANKED, COLUMNS, TO_BLANK, Gone, Keyed, Place, Prepared

_read = bytes_rows.reader(TURNS, COLUMNS)
_INSERT = f"""
    INSERT INTO turns ({", ".join(COLUMNS)}, token_ids)
    VALUES ({", ".join(f":{name}" for name in COLUMNS)}, :token_ids)
"""
_STRETCH = "WHERE branch = ? AND number > ? AND number <= ? ORDER BY number"


def insert(connection: Connection, tenant: str, branch: str, made: Prepared, placed: Turn) -> None:
    """Insert a turn, whose number and key the caller knows to be free. placed: with its place, time and key."""
    raw(connection).execute(_INSERT, turn_row.row_of(tenant, branch, made, placed))


def keyed(connection: Connection, tenant: str, key: str) -> Keyed | None:
    """Find the turn that has a key; None where it is free."""
    names = bytes_rows.selected(("branch", "number", "digest"))
    statement = f"SELECT {names} FROM turns WHERE tenant = ? AND key = ?"
    row = raw(connection).execute(statement, (tenant, key)).fetchone()
    if row is None:
        return None
    branch, number, digest = row
    return Keyed(branch.decode(errors="replace"), int(number) if number.isdigit() else 0, digest)


def place(connection: Connection, branch: str, number: int) -> Place | None:
    """Find where a turn of a branch ends; None where there is no such turn. Errors: CHECKSUM_MISMATCH."""
    found = next(_turns(connection, "WHERE branch = ? AND number = ?", (branch, number), "", False), None)
    return None if found is None else Place(branch, number, found.start + found.token_count)


def get(connection: Connection, tenant: str, key: str, *, token_ids: bool) -> Turn | None:
    """Read the turn that has a key; None where there is none. Errors: CHECKSUM_MISMATCH."""
    found = keyed(connection, tenant, key)
    if found is None:
        return None
    owner = session_rows.branch(connection, found.branch)
    session_id = "" if owner is None else owner.session_id
    return next(_turns(connection, "WHERE tenant = ? AND key = ?", (tenant, key), session_id, token_ids), None)


def of_stretch(
    connection: Connection, stretch: Stretch, after: int, session_id: str, *, token_ids: bool
) -> Iterator[Turn]:
    """Read the turns of a stretch behind the number `after`. session_id: that of its branch. Errors:
    CHECKSUM_MISMATCH."""
    return _turns(connection, _STRETCH, (stretch.branch, after, stretch.last), session_id, token_ids)


def count(connection: Connection, branch: str, after: int, last: int = LARGEST_INT64) -> tuple[int, int, int]:
    """Count the turns of a branch behind the number `after` up to `last`, their tokens, and what they count in
    bytes."""
    statement = """
        SELECT count(*), coalesce(sum(token_count), 0), coalesce(sum(size), 0) FROM turns
        WHERE branch = ? AND number > ? AND number <= ?
    """
    found: tuple[int, int, int] = raw(connection).execute(statement, (branch, after, last)).fetchone()
    return found


def to_blank(connection: Connection, branch: str, first: int, last: int, most: int) -> list[dict[str, Any]]:
    """Read the rows of at most `most` turns of a branch that are not forgotten, without what was said in them."""
    statement = f"""
        SELECT {", ".join(TO_BLANK)} FROM turns
        WHERE branch = ? AND number >= ? AND number <= ? AND status != 'forgotten' ORDER BY number LIMIT ?
    """
    found = raw(connection).execute(statement, (branch, first, last, most)).fetchall()
    return [dict(zip(TO_BLANK, row, strict=True)) for row in found]


def blank(connection: Connection, row: Mapping[str, Any], key: str) -> None:
    """Leave of a turn its number, start and count of tokens, under another key. row: as `to_blank` has read it."""
    changes = ", ".join(f"{name} = :{name}" for name in BLANKED)
    raw(connection).execute(f"UPDATE turns SET {changes} WHERE turn_id = :turn_id", turn_row.blanked(row, key))


def clear_some(connection: Connection, branch: str, after: int, most: int) -> Gone:
    """Delete at most `most` turns of a branch behind the number `after`."""
    statement = """
        DELETE FROM turns WHERE turn_id IN (SELECT turn_id FROM turns WHERE branch = ? AND number > ? LIMIT ?)
        RETURNING token_count, size
    """
    gone: Sequence[tuple[int, int]] = raw(connection).execute(statement, (branch, after, most)).fetchall()
    size = sum(size for _, size in gone)
    session_rows.add_bytes(connection, branch, -size)
    return Gone(len(gone), sum(tokens for tokens, _ in gone), size)


def _turns(
    connection: Connection, where: str, values: tuple[object, ...], session_id: str, token_ids: bool
) -> Iterator[Turn]:
    ids = "CAST(token_ids AS BLOB)" if token_ids else "NULL"
    with closing(
        raw(connection).execute(f"SELECT {bytes_rows.selected(COLUMNS)}, {ids} FROM turns {where}", values)
    ) as rows:
        for row in rows:
            yield turn_of(row, session_id)


# What reads the rows that `turn_of` takes.
SELECT_TURNS = f"SELECT {bytes_rows.selected((*COLUMNS, 'token_ids'))} FROM turns"
SELECT_SHORT_TURNS = f"SELECT {bytes_rows.selected(COLUMNS)}, NULL FROM turns"
# The place of the branch in such a row.
BRANCH = COLUMNS.index("branch")


def turn_of(row: Sequence[Any], session_id: str) -> Turn:
    """Make the value of a row of `SELECT_TURNS`, whose token ids may be None. session_id: that of its branch. Errors:
    CHECKSUM_MISMATCH."""
    try:
        found = _read(row)
    except (ValueError, TypeError):
        number = row[COLUMNS.index("number")] or b""
        raise damaged_turn(session_id, int(number) if number.isdigit() else 0) from None
    return turn_row.turn_of(found, row[-1], session_id)
