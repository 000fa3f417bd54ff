"""The rows of turns; implements `memory_service.storage.sessions.rows.TurnRows`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from memory_service.domain.sessions import Stretch, Turn
from memory_service.storage.postgres.database import raw
from memory_service.storage.postgres.rows import session_rows
from memory_service.storage.postgres.rows.sought import sought
from memory_service.storage.sessions import turn_row
from memory_service.storage.sessions.turn_row import BLANKED, COLUMNS, TO_BLANK, Gone, Keyed, Place, Prepared

# Turns that are read at once: each may have two MiB of words, and one of token ids.
_PAGE = 32
_INSERT = f"""
    INSERT INTO turns ({", ".join(COLUMNS)}, token_ids)
    VALUES ({", ".join(f"%({name})s" for name in COLUMNS)}, %(token_ids)s)
"""
_STRETCH = "WHERE branch = %s AND number > %s AND number <= %s ORDER BY number LIMIT %s"
_TO_BLANK = f"""
    SELECT {", ".join(TO_BLANK)} FROM turns
    WHERE branch = %s AND number >= %s AND number <= %s AND status != 'forgotten' ORDER BY number LIMIT %s
"""
_BLANK = f"UPDATE turns SET {', '.join(f'{name} = %({name})s' for name in BLANKED)} WHERE turn_id = %(turn_id)s"
_CLEAR = """
    DELETE FROM turns WHERE turn_id IN (SELECT turn_id FROM turns WHERE {} LIMIT %s) RETURNING token_count, size
"""


def insert(connection: Connection, tenant: str, branch: str, made: Prepared, placed: Turn) -> None:
    """Insert a turn, whose number and key the caller knows to be free. placed: with its place, time and key."""
    raw(connection).execute(_INSERT, turn_row.row_of(tenant, branch, made, placed))


def keyed(connection: Connection, tenant: str, key: str) -> Keyed | None:
    """Find the turn that has a key; None where it is free."""
    statement = "SELECT branch, number, digest FROM turns WHERE tenant = %s AND key = %s"
    row = raw(connection).execute(statement, (tenant, sought(key))).fetchone()
    return None if row is None else Keyed(*row)


def place(connection: Connection, branch: str, number: int) -> Place | None:
    """Find where a turn of a branch ends; None where there is no such turn. Errors: CHECKSUM_MISMATCH."""
    found = next(iter(_turns(connection, "WHERE branch = %s AND number = %s", (branch, number), "", False)), None)
    return None if found is None else Place(branch, number, found.start + found.token_count)


def get(connection: Connection, tenant: str, key: str, *, token_ids: bool) -> Turn | None:
    """Read the turn that has a key; None where there is none. Errors: CHECKSUM_MISMATCH."""
    found = keyed(connection, tenant, key)
    if found is None:
        return None
    owner = session_rows.branch(connection, found.branch)
    session_id = "" if owner is None else owner.session_id
    asked = "WHERE tenant = %s AND key = %s"
    return next(iter(_turns(connection, asked, (tenant, sought(key)), session_id, token_ids)), None)


def of_stretch(
    connection: Connection, stretch: Stretch, after: int, session_id: str, *, token_ids: bool
) -> Iterator[Turn]:
    """Read the turns of a stretch behind the number `after`. session_id: that of its branch. Errors:
    CHECKSUM_MISMATCH."""
    while True:
        found = _turns(connection, _STRETCH, (stretch.branch, after, stretch.last, _PAGE), session_id, token_ids)
        yield from found
        if len(found) < _PAGE:
            return
        after = found[-1].number


def _turns(
    connection: Connection, where: str, values: tuple[object, ...], session_id: str, token_ids: bool
) -> list[Turn]:
    ids = "token_ids" if token_ids else "NULL"
    statement = f"SELECT {', '.join(COLUMNS)}, {ids} FROM turns {where}"
    rows = raw(connection).execute(statement, values, binary=True).fetchall()
    return [turn_row.turn_of(dict(zip(COLUMNS, row, strict=False)), row[-1], session_id) for row in rows]


def to_blank(connection: Connection, branch: str, first: int, last: int, most: int) -> list[dict[str, Any]]:
    """Read the rows of at most `most` turns of a branch that are not forgotten, without what was said in them."""
    found = raw(connection).execute(_TO_BLANK, (branch, first, last, most)).fetchall()
    return [dict(zip(TO_BLANK, row, strict=True)) for row in found]


def blank(connection: Connection, row: Mapping[str, Any], key: str) -> None:
    """Leave of a turn its number, start and count of tokens, under another key. row: as `to_blank` has read it."""
    raw(connection).execute(_BLANK, turn_row.blanked(row, key))


def clear_some(connection: Connection, branch: str, after: int, most: int) -> Gone:
    """Delete at most `most` turns of a branch behind the number `after`."""
    gone = _clear(connection, "branch = %s AND number > %s", (branch, after, most))
    session_rows.add_bytes(connection, branch, -gone.size)
    return gone


def clear_some_of(connection: Connection, tenant: str, most: int) -> Gone:
    """Delete at most `most` turns of a tenant whose sessions are gone."""
    return _clear(connection, "tenant = %s", (tenant, most))


def _clear(connection: Connection, where: str, values: Sequence[object]) -> Gone:
    gone = raw(connection).execute(_CLEAR.format(where), values).fetchall()
    return Gone(len(gone), sum(tokens for tokens, _ in gone), sum(size for _, size in gone))
