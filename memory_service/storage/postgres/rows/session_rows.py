"""The rows of sessions and of their branches; implements `memory_service.storage.sessions.rows.SessionRows`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection

from memory_service.domain.errors import damaged_session, session_not_found
from memory_service.domain.sessions import Session, Stretch
from memory_service.storage.base import SessionTotals
from memory_service.storage.postgres.database import raw
from memory_service.storage.postgres.rows.sought import sought
from memory_service.storage.sessions import session_row
from memory_service.storage.sessions.session_row import BRANCH_COLUMNS, COLUMNS, Branch, branch_checksum

# Sessions that are read at once.
_PAGE = 100
_SELECT = f"SELECT {', '.join(COLUMNS)} FROM sessions"
_SAVE = f"""
    INSERT INTO sessions ({", ".join(COLUMNS)}) VALUES ({", ".join(f"%({name})s" for name in COLUMNS)})
    ON CONFLICT (session_id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in COLUMNS)}
"""
_ALIVE = "(expires IS NULL OR expires > %(now)s)"
_SELECT_BRANCHES = f"SELECT {', '.join(BRANCH_COLUMNS)} FROM branches"
_ADD_BRANCH = f"""
    INSERT INTO branches ({", ".join(BRANCH_COLUMNS)}) VALUES ({", ".join(["%s"] * len(BRANCH_COLUMNS))})
"""
# A branch and what it goes on behind, the last first.
_ANCESTRY = f"""
    WITH RECURSIVE line AS (
        SELECT branches.*, 0 AS depth FROM branches WHERE branch = %s
        UNION ALL SELECT branches.*, depth + 1 FROM line JOIN branches ON branches.branch = line.parent
    ) SELECT {", ".join(BRANCH_COLUMNS)} FROM line ORDER BY depth
"""
_TOTALS = """
    SELECT count(*), count(*) FILTER (WHERE lease_expires > %s),
        (SELECT coalesce(sum(bytes), 0)::bigint FROM branches)
    FROM sessions
"""


# Sessions


def save(connection: Connection, session: Session) -> None:
    """Insert or replace the row of a session."""
    row = session_row.row_of(session)
    raw(connection).execute(_SAVE, row | {"reader_digest": json.dumps(session.reader_digest)})


def delete(connection: Connection, session_id: str) -> None:
    """Delete the row of a session; the caller has seen to its branches."""
    raw(connection).execute("DELETE FROM sessions WHERE session_id = %s", (session_id,))


def delete_all_of(connection: Connection, tenant: str) -> None:
    """Delete all sessions of a tenant, with all their turns and windows."""
    for table in ("turns", "branches", "windows", "sessions"):
        raw(connection).execute(f"DELETE FROM {table} WHERE tenant = %s", (tenant,))


def get(connection: Connection, tenant: str, session_id: str, now: int) -> Session:
    """Read a session of a tenant with its stretches. Errors: SESSION_NOT_FOUND, also where it has expired;
    CHECKSUM_MISMATCH."""
    where = f"session_id = %(session)s AND tenant = %(tenant)s AND {_ALIVE}"
    return _one(connection, where, {"session": sought(session_id), "tenant": tenant, "now": now}, session_id)


def named(connection: Connection, tenant: str, name: str, now: int) -> Session:
    """Read a session of a tenant by its name, with its stretches. Errors: as those of `get`."""
    where = f"name = %(name)s AND tenant = %(tenant)s AND {_ALIVE}"
    return _one(connection, where, {"name": sought(name), "tenant": tenant, "now": now}, name)


def _one(connection: Connection, where: str, values: Mapping[str, object], said: str) -> Session:
    row = raw(connection).execute(f"{_SELECT} WHERE {where}", values).fetchone()
    if row is None:
        raise session_not_found(said)
    session = _session_of(row)
    if session is None:
        raise damaged_session(said)
    return with_line(connection, session)


def _session_of(row: Sequence[Any]) -> Session | None:
    """Make the value of a row, without its stretches; None for a row that is not as it was written."""
    found = dict(zip(COLUMNS, row, strict=True))
    try:
        return session_row.session_of(found | {"reader_digest": json.loads(found["reader_digest"])})
    except ValueError:
        return None


def taken(connection: Connection, tenant: str, name: str) -> tuple[str, int | None] | None:
    """Return id and time of expiry of the session that has a name, also where it has expired; None for a name that is
    free."""
    statement = "SELECT session_id, expires FROM sessions WHERE tenant = %s AND name = %s"
    row = raw(connection).execute(statement, (tenant, name)).fetchone()
    return None if row is None else (row[0], row[1])


def banks_of(connection: Connection, tenant: str) -> Iterator[str]:
    """Return the names of the banks in which sessions of a tenant have their chunks."""
    found = raw(connection).execute("SELECT DISTINCT bank FROM sessions WHERE tenant = %s", (tenant,))
    return iter([bank for (bank,) in found])


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
    values: dict[str, object] = {"tenant": tenant, "now": now, "most": _PAGE}
    where = ["tenant = %(tenant)s", _ALIVE]
    if banks is not None:
        where.append("bank = ANY(%(banks)s)")
        values["banks"] = list(banks)
    if metadata:
        where.append("meta::jsonb @> %(pairs)s::jsonb")
        values["pairs"] = json.dumps(dict(metadata))
    place, order = "(updated, session_id) < (%(updated)s, %(session)s)", "ORDER BY updated DESC, session_id DESC"
    while True:
        behind = [] if before is None else [place]
        if before is not None:
            values |= {"updated": before[0], "session": sought(before[1])}
        statement = f"{_SELECT} WHERE {' AND '.join([*where, *behind])} {order} LIMIT %(most)s"
        rows = raw(connection).execute(statement, values).fetchall()
        yield from (session for session in map(_session_of, rows) if session is not None)
        if len(rows) < _PAGE:
            return
        last = dict(zip(COLUMNS, rows[-1], strict=True))
        before = last["updated"], last["session_id"]


def existing(connection: Connection, session_ids: Iterable[str]) -> set[str]:
    """Return those of some session ids of which there is a session, of any tenant."""
    statement = "SELECT session_id FROM sessions WHERE session_id = ANY(%s)"
    return {found for (found,) in raw(connection).execute(statement, (list(session_ids),))}


def expired(connection: Connection, now: int, most: int) -> list[tuple[str, str]]:
    """Return tenant and id of sessions that have expired, at most `most`."""
    statement = "SELECT tenant, session_id FROM sessions WHERE expires <= %s LIMIT %s"
    return [(tenant, session) for tenant, session in raw(connection).execute(statement, (now, most))]


def count(connection: Connection, tenant: str) -> int:
    """Count the sessions of a tenant, expired ones that are not removed yet too."""
    return _number(connection, "SELECT count(*) FROM sessions WHERE tenant = %s", tenant)


def totals(connection: Connection, now: int) -> SessionTotals:
    """Count all sessions, those that a worker has, and the bytes of all turns."""
    row = raw(connection).execute(_TOTALS, (now,)).fetchone()
    assert row is not None
    return SessionTotals(*row)


def is_used(connection: Connection, tenant: str, bank: str, *, but: str = "") -> bool:
    """Tell whether any session of a tenant has its chunks in a bank. but: the id of a session that does not count."""
    statement = "SELECT 1 FROM sessions WHERE tenant = %s AND bank = %s AND session_id != %s LIMIT 1"
    return raw(connection).execute(statement, (tenant, bank, but)).fetchone() is not None


def _number(connection: Connection, statement: str, *values: object) -> int:
    row = raw(connection).execute(statement, values).fetchone()
    return 0 if row is None else int(row[0])


# Branches


def add_branch(connection: Connection, branch: Branch) -> None:
    """Insert the row of a branch."""
    raw(connection).execute(_ADD_BRANCH, (*branch, branch_checksum(branch)))


def give_branch(connection: Connection, branch: Branch, session_id: str) -> None:
    """Let a branch be that of another session, because its own is gone."""
    given = branch._replace(session_id=session_id)
    statement = "UPDATE branches SET session_id = %s, checksum = %s WHERE branch = %s"
    raw(connection).execute(statement, (session_id, branch_checksum(given), branch.branch))


def branch(connection: Connection, name: str) -> Branch | None:
    """Read the row of a branch; None where it is not there. Errors: CHECKSUM_MISMATCH."""
    row = raw(connection).execute(f"{_SELECT_BRANCHES} WHERE branch = %s", (name,)).fetchone()
    return None if row is None else _branch_of(row)


def _branch_of(row: Sequence[Any]) -> Branch:
    """Make the value of a row of a branch. Errors: CHECKSUM_MISMATCH."""
    *values, checksum = row
    if checksum != branch_checksum(found := Branch(*values)):
        raise damaged_session(found.session_id)
    return found


def delete_branch(connection: Connection, name: str) -> None:
    """Delete the row of a branch; the caller has seen to its turns."""
    raw(connection).execute("DELETE FROM branches WHERE branch = %s", (name,))


def add_bytes(connection: Connection, name: str, more: int) -> None:
    """Count bytes of turns in a branch; fewer where `more` is negative."""
    raw(connection).execute("UPDATE branches SET bytes = bytes + %s WHERE branch = %s", (more, name))


def branches_of(connection: Connection, session_id: str) -> dict[str, Branch]:
    """Return the branches of a session, also those from which it was rewound, by name. Errors: CHECKSUM_MISMATCH."""
    found = raw(connection).execute(f"{_SELECT_BRANCHES} WHERE session_id = %s", (session_id,))
    return {each.branch: each for each in map(_branch_of, found.fetchall())}


def children_of(connection: Connection, session_id: str) -> list[Branch]:
    """Return the branches, of whichever session, that go on behind one of a session. Errors: CHECKSUM_MISMATCH."""
    statement = f"{_SELECT_BRANCHES} WHERE parent IN (SELECT branch FROM branches WHERE session_id = %s)"
    return list(map(_branch_of, raw(connection).execute(statement, (session_id,)).fetchall()))


def line(connection: Connection, name: str, last: int, end: int | None = None) -> tuple[Stretch, ...]:
    """Return the stretches, first to last, by which one comes to the turn `last` of a branch. Errors:
    CHECKSUM_MISMATCH; SESSION_NOT_FOUND where a branch is not there any more."""
    ancestry = map(_branch_of, raw(connection).execute(_ANCESTRY, (name,)))
    return session_row.line_of(ancestry, name, last, end)


def with_line(connection: Connection, session: Session) -> Session:
    """Return a session with its stretches. Errors: those of `line`."""
    return replace(session, stretches=line(connection, session.branch, session.head))
