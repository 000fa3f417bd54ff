"""The rows of turns and branches, as forgetting asks for them; implements
`memory_service.storage.forgetting.rows.ForgottenTurnRows`. A function that changes rows runs in a transaction of the
writer, one that only reads also in that of a reader."""

import json
from collections.abc import Sequence

from sqlalchemy import Connection

from memory_service.domain.model import Chunk
from memory_service.domain.sessions import BRANCH
from memory_service.storage.forgetting.parts import Part
from memory_service.storage.local.records.schema import raw

_ENDS = "SELECT start, start + token_count FROM turns WHERE branch = ? AND number IN (?, ?) ORDER BY number"
_BEHIND = """
    WITH RECURSIVE behind(branch, begin) AS (
        SELECT branch, cut_tokens FROM branches WHERE parent = :branch AND cut_turn >= :first
        UNION SELECT branches.branch, cut_tokens FROM branches JOIN behind ON parent = behind.branch
    )
    SELECT branch, begin FROM behind
"""
_HAVE_THEM = """
    SELECT session_id, tenant FROM sessions
    WHERE branch = :branch AND head >= :first OR branch IN (SELECT value FROM json_each(:behind))
"""
_OVERLAP = """
    SELECT 1 FROM turns INDEXED BY ix_turns_branch_start
    WHERE branch = ? AND status = 'forgotten' AND start < ? AND start + token_count > ? LIMIT 1
"""
_GONE_BRANCH = "SELECT 1 FROM gone_branches WHERE branch = ? AND start <= ?"


def ends(connection: Connection, branch: str, first: int, last: int) -> list[tuple[int, int]]:
    """Return the tokens of the session before and up to each of two turns of a branch, as far as they are there."""
    found: list[tuple[int, int]] = raw(connection).execute(_ENDS, (branch, first, last)).fetchall()
    return found


def is_part(connection: Connection, branch: str, number: int) -> bool:
    """Tell whether a turn has a part of a message whose answer is in a later one."""
    statement = "SELECT 1 FROM turns WHERE branch = ? AND number = ? AND status = 'part'"
    return raw(connection).execute(statement, (branch, number)).fetchone() is not None


def behind(connection: Connection, branch: str, first: int) -> list[Part]:
    """Return the parts of branches that go on behind a turn of a branch, or a later one."""
    found = raw(connection).execute(_BEHIND, {"branch": branch, "first": first})
    return [Part(str(name), int(begin)) for name, begin in found.fetchall()]


def having(connection: Connection, branch: str, first: int, behind: Sequence[str]) -> dict[str, str]:
    """Return id and tenant of the sessions that go on with a branch, and have the turn `first` of it, or go on with one
    of the branches behind."""
    asked = {"branch": branch, "first": first, "behind": json.dumps(list(behind))}
    return dict(raw(connection).execute(_HAVE_THEM, asked).fetchall())


def note_gone(connection: Connection, branch: str, start: int, now: int) -> None:
    """Note that the tokens of a branch from an offset on are gone for good."""
    statement = """
        INSERT INTO gone_branches VALUES (?, ?, ?)
        ON CONFLICT (branch) DO UPDATE SET start = min(start, excluded.start), gone = excluded.gone
    """
    raw(connection).execute(statement, (branch, start, now))


def refuses(connection: Connection, chunk: Chunk) -> bool:
    """Tell whether a chunk, which may say of which branch of a session it is, has tokens that were forgotten."""
    branch = chunk.metadata.get(BRANCH)
    if not isinstance(branch, str):
        return False
    driver, start, length = raw(connection), chunk.start, chunk.original_length
    if driver.execute(_GONE_BRANCH, (branch, start)).fetchone():
        return True
    return driver.execute(_OVERLAP, (branch, start + length, start)).fetchone() is not None
