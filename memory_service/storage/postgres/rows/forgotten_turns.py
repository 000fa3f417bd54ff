"""The rows of turns and branches, as forgetting asks for them; implements
`memory_service.storage.forgetting.rows.ForgottenTurnRows`."""

from collections.abc import Sequence

from sqlalchemy import Connection

from memory_service.storage.forgetting.parts import Part
from memory_service.storage.postgres.database import raw

_ENDS = "SELECT start, start + token_count FROM turns WHERE branch = %s AND number IN (%s, %s) ORDER BY number"
_BEHIND = """
    WITH RECURSIVE behind(branch, begin_tokens) AS (
        SELECT branch, cut_tokens FROM branches WHERE parent = %(branch)s AND cut_turn >= %(first)s
        UNION SELECT branches.branch, cut_tokens FROM branches JOIN behind ON parent = behind.branch
    )
    SELECT branch, begin_tokens FROM behind
"""
_HAVE_THEM = """
    SELECT session_id, tenant FROM sessions
    WHERE branch = %(branch)s AND head >= %(first)s OR branch = ANY(%(behind)s)
"""
_NOTE_GONE = """
    INSERT INTO gone_branches (branch, start, gone) VALUES (%s, %s, %s)
    ON CONFLICT (branch) DO UPDATE SET start = least(gone_branches.start, excluded.start), gone = excluded.gone
"""


def ends(connection: Connection, branch: str, first: int, last: int) -> list[tuple[int, int]]:
    """Return the tokens of the session before and up to each of two turns of a branch, as far as they are there."""
    found = raw(connection).execute(_ENDS, (branch, first, last)).fetchall()
    return [(begin, end) for begin, end in found]


def is_part(connection: Connection, branch: str, number: int) -> bool:
    """Tell whether a turn has a part of a message whose answer is in a later one."""
    statement = "SELECT 1 FROM turns WHERE branch = %s AND number = %s AND status = 'part'"
    return raw(connection).execute(statement, (branch, number)).fetchone() is not None


def behind(connection: Connection, branch: str, first: int) -> list[Part]:
    """Return the parts of branches that go on behind a turn of a branch, or a later one."""
    found = raw(connection).execute(_BEHIND, {"branch": branch, "first": first}).fetchall()
    return [Part(name, begin) for name, begin in found]


def having(connection: Connection, branch: str, first: int, behind: Sequence[str]) -> dict[str, str]:
    """Return id and tenant of the sessions that go on with a branch, and have the turn `first` of it, or go on with one
    of the branches behind."""
    asked = {"branch": branch, "first": first, "behind": list(behind)}
    return dict(raw(connection).execute(_HAVE_THEM, asked).fetchall())


def note_gone(connection: Connection, branch: str, start: int, now: int) -> None:
    """Note that the tokens of a branch from an offset on are gone for good."""
    raw(connection).execute(_NOTE_GONE, (branch, start, now))
