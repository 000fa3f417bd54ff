"""The rows of sessions and of their branches; implements `memory_service.storage.sessions.rows.SessionRows`. A function
that changes rows runs in a transaction of the writer, one that only reads also in that of a reader.

This file owns that a damaged row cannot fail the driver: texts are read as bytes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection

from memory_service.domain.errors import damaged_session, session_not_found
from memory_service.domain.sessions import Session, Stretch
from memory_service.storage.base import SessionTotals
from memory_service.storage.local.records import bytes_rows
from memory_service.storage.local.records.schema import raw
from memory_service.storage.local.records.tables import BRANCHES, SESSIONS
from memory_service.storage.sessions import session_row
from memory_service.storage.sessions.session_row import BRANCH_COLUMNS, Branch, branch_checksum

_NAMES = session_row.COLUMNS
_read = bytes_rows.reader(SESSIONS, _NAMES)
_SELECT = f"SELECT {bytes_rows.selected(_NAMES)} FROM sessions"
# No REPLACE, which would delete another session of the same name.
_SAVE = f"""
    INSERT INTO sessions ({", ".join(_NAMES)}) VALUES ({", ".join(f":{name}" for name in _NAMES)})
    ON CONFLICT (session_id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in _NAMES)}
"""
_ADD_BRANCH = f"""
    INSERT INTO branches ({", ".join(BRANCH_COLUMNS)}) VALUES ({", ".join("?" * len(BRANCH_COLUMNS))})
"""
_ALIVE = "(expires IS NULL OR expires > :now)"
_HAS_PAIR = "EXISTS (SELECT 1 FROM json_each(sessions.meta) WHERE key = :k{0} AND type = 'text' AND value = :v{0})"
_read_branch = bytes_rows.reader(BRANCHES, BRANCH_COLUMNS)


# Sessions


def save(connection: Connection, session: Session) -> None:
    """Insert or replace the row of a session."""
    raw(connection).execute(_SAVE, session_row.row_of(session))


def delete(connection: Connection, session_id: str) -> None:
    """Delete the row of a session; the caller has seen to its branches."""
    raw(connection).execute("DELETE FROM sessions WHERE session_id = ?", (session_id,))


def delete_all_of(connection: Connection, tenant: str) -> None:
    """Delete all sessions of a tenant, with all their turns and windows."""
    for table in ("turns", "branches", "windows", "sessions"):
        raw(connection).execute(f"DELETE FROM {table} WHERE tenant = ?", (tenant,))


def get(connection: Connection, tenant: str, session_id: str, now: int) -> Session:
    """Read a session of a tenant with its stretches. Errors: SESSION_NOT_FOUND, also where it has expired;
    CHECKSUM_MISMATCH."""
    where = f"session_id = :session AND tenant = :tenant AND {_ALIVE}"
    return _one(connection, where, {"session": session_id, "tenant": tenant, "now": now}, session_id)


def named(connection: Connection, tenant: str, name: str, now: int) -> Session:
    """Read a session of a tenant by its name, with its stretches. Errors: as those of `get`."""
    where = f"name = :name AND tenant = :tenant AND {_ALIVE}"
    return _one(connection, where, {"name": name, "tenant": tenant, "now": now}, name)


def _one(connection: Connection, where: str, values: Mapping[str, object], said: str) -> Session:
    row = raw(connection).execute(f"{_SELECT} WHERE {where}", values).fetchone()
    if row is None:
        raise session_not_found(said)
    session = session_of(row)
    if session is None:
        raise damaged_session(said)
    return with_line(connection, session)


def taken(connection: Connection, tenant: str, name: str) -> tuple[str, int | None] | None:
    """Return id and time of expiry of the session that has a name, also where it has expired; None for a name that is
    free."""
    statement = "SELECT session_id, expires FROM sessions WHERE tenant = ? AND name = ?"
    found: tuple[str, int | None] | None = raw(connection).execute(statement, (tenant, name)).fetchone()
    return found


def banks_of(connection: Connection, tenant: str) -> Iterator[str]:
    """Return the names of the banks in which sessions of a tenant have their chunks. This looks at an index alone."""
    statement = "SELECT CAST(bank AS BLOB) FROM (SELECT DISTINCT bank FROM sessions WHERE tenant = ?)"
    return (bank.decode(errors="replace") for (bank,) in raw(connection).execute(statement, (tenant,)).fetchall())


def newest(
    connection: Connection,
    tenant: str,
    before: tuple[int, str] | None,
    metadata: Mapping[str, str],
    now: int,
    banks: Sequence[str] | None = None,
) -> Iterator[Session]:
    """Read the sessions of a tenant that have these metadata, newest change first, without their stretches and without
    damaged ones. before: time of change and id of the last one of the page before. banks: those in which their chunks
    are; None for any."""
    values: dict[str, object] = {"tenant": tenant, "now": now}
    where = ["tenant = :tenant", _ALIVE]
    if before is not None:
        where.append("(updated, session_id) < (:updated, :session)")
        values |= {"updated": before[0], "session": before[1]}
    if banks is not None:
        where.append("bank IN (SELECT value FROM json_each(:banks))")
        values["banks"] = json.dumps(list(banks))
    for place, (key, value) in enumerate(metadata.items()):
        where.append(_HAS_PAIR.format(place))
        values |= {f"k{place}": key, f"v{place}": value}
    statement = f"{_SELECT} WHERE {' AND '.join(where)} ORDER BY updated DESC, session_id DESC"
    with closing(raw(connection).execute(statement, values)) as rows:
        yield from (session for session in map(session_of, rows) if session is not None)


def existing(connection: Connection, session_ids: Iterable[str]) -> set[str]:
    """Return those of some session ids of which there is a session, of any tenant."""
    statement = "SELECT session_id FROM sessions WHERE session_id IN (SELECT value FROM json_each(?))"
    return {found for (found,) in raw(connection).execute(statement, (json.dumps(list(session_ids)),))}


def expired(connection: Connection, now: int, most: int) -> list[tuple[str, str]]:
    """Return tenant and id of sessions that have expired, at most `most`."""
    statement = "SELECT tenant, session_id FROM sessions WHERE expires IS NOT NULL AND expires <= ? LIMIT ?"
    return [(str(tenant), str(session)) for tenant, session in raw(connection).execute(statement, (now, most))]


def count(connection: Connection, tenant: str) -> int:
    """Count the sessions of a tenant, expired ones that are not removed yet too."""
    return int(raw(connection).execute("SELECT count(*) FROM sessions WHERE tenant = ?", (tenant,)).fetchone()[0])


def totals(connection: Connection, now: int) -> SessionTotals:
    """Count all sessions, those that a worker has, and the bytes of all turns."""
    held = "count(*), coalesce(sum(lease_expires > ?), 0), (SELECT coalesce(sum(bytes), 0) FROM branches)"
    return SessionTotals(*raw(connection).execute(f"SELECT {held} FROM sessions", (now,)).fetchone())


def is_used(connection: Connection, tenant: str, bank: str, *, but: str = "") -> bool:
    """Tell whether any session of a tenant has its chunks in a bank. but: the id of a session that does not count."""
    statement = "SELECT 1 FROM sessions WHERE tenant = ? AND bank = ? AND session_id != ? LIMIT 1"
    return raw(connection).execute(statement, (tenant, bank, but)).fetchone() is not None


def session_of(row: Sequence[Any]) -> Session | None:
    """Make the value of a row of `SELECT_SESSIONS`, without its stretches; None for a row that is not as it was
    written."""
    try:
        return session_row.session_of(_read(row))
    except (ValueError, TypeError):
        return None


# What reads the rows that `session_of` takes.
SELECT_SESSIONS = _SELECT


# Branches


def add_branch(connection: Connection, branch: Branch) -> None:
    """Insert the row of a branch."""
    raw(connection).execute(_ADD_BRANCH, (*branch, branch_checksum(branch)))


def give_branch(connection: Connection, branch: Branch, session_id: str) -> None:
    """Let a branch be that of another session, because its own is gone."""
    given = branch._replace(session_id=session_id)
    statement = "UPDATE branches SET session_id = ?, checksum = ? WHERE branch = ?"
    raw(connection).execute(statement, (session_id, branch_checksum(given), branch.branch))


def branch(connection: Connection, name: str) -> Branch | None:
    """Read the row of a branch; None where it is not there. Errors: CHECKSUM_MISMATCH."""
    row = raw(connection).execute(f"{SELECT_BRANCHES} WHERE branch = ?", (name,)).fetchone()
    return None if row is None else branch_of(row)


def branch_of(row: Sequence[Any]) -> Branch:
    """Make the value of a row of `SELECT_BRANCHES`. Errors: CHECKSUM_MISMATCH."""
    with suppress(ValueError, TypeError):
        *values, checksum = _read_branch(row).values()
        if checksum == branch_checksum(found := Branch(*values)):
            return found
    session_id = row[1]
    raise damaged_session(session_id.decode(errors="replace") if isinstance(session_id, bytes) else "")


# What reads the rows that `branch_of` takes.
SELECT_BRANCHES = f"SELECT {bytes_rows.selected(BRANCH_COLUMNS)} FROM branches"
# Those of a branch and of what it goes on behind, the last first: CROSS JOIN keeps the order of the steps.
_ANCESTRY = f"""
    WITH RECURSIVE line (name) AS (
        SELECT ? UNION ALL
        SELECT branches.parent FROM line JOIN branches ON branches.branch = line.name
        WHERE branches.parent IS NOT NULL
    ) {SELECT_BRANCHES.replace(" FROM branches", " FROM line CROSS JOIN branches ON branch = name")}
"""


def delete_branch(connection: Connection, name: str) -> None:
    """Delete the row of a branch; the caller has seen to its turns."""
    raw(connection).execute("DELETE FROM branches WHERE branch = ?", (name,))


def add_bytes(connection: Connection, name: str, more: int) -> None:
    """Count bytes of turns in a branch; fewer where `more` is negative."""
    raw(connection).execute("UPDATE branches SET bytes = bytes + ? WHERE branch = ?", (more, name))


def branches_of(connection: Connection, session_id: str) -> dict[str, Branch]:
    """Return the branches of a session, also those from which it was rewound, by name. Errors: CHECKSUM_MISMATCH."""
    found = raw(connection).execute(f"{SELECT_BRANCHES} WHERE session_id = ?", (session_id,))
    return {each.branch: each for each in map(branch_of, found.fetchall())}


def children_of(connection: Connection, session_id: str) -> list[Branch]:
    """Return the branches, of whichever session, that go on behind one of a session. Errors: CHECKSUM_MISMATCH."""
    statement = f"{SELECT_BRANCHES} WHERE parent IN (SELECT branch FROM branches WHERE session_id = ?)"
    return list(map(branch_of, raw(connection).execute(statement, (session_id,)).fetchall()))


def line(connection: Connection, name: str, last: int, end: int | None = None) -> tuple[Stretch, ...]:
    """Return the stretches, first to last, by which one comes to the turn `last` of a branch. Errors:
    CHECKSUM_MISMATCH; SESSION_NOT_FOUND where a branch is not there any more."""
    ancestry = map(branch_of, raw(connection).execute(_ANCESTRY, (name,)))
    return session_row.line_of(ancestry, name, last, end)


def with_line(connection: Connection, session: Session) -> Session:
    """Return a session with its stretches. Errors: those of `line`."""
    return replace(session, stretches=line(connection, session.branch, session.head))
