"""Turns that are forgotten: which rows they are, which sessions have them, and what is left of each. A function that
changes rows runs in a transaction of the writer, one that only reads also in that of a reader."""

import json
import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import Connection

from memory_service.domain import sessions as rules
from memory_service.domain.errors import turn_not_found
from memory_service.domain.model import Chunk
from memory_service.domain.sessions import BRANCH, Session, Stretch
from memory_service.domain.validate import LARGEST_INT64
from memory_service.storage.local.records import session_rows, turn_rows, window_rows
from memory_service.storage.local.records.schema import raw
from memory_service.storage.sessions.session_row import NEVER
from memory_service.storage.sessions.turn_row import ROW_BYTES, Gone

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


class Span(NamedTuple):
    """Turns of one branch, by their numbers, both included, and the tokens of the session before the first and up to
    the last."""

    branch: str
    first: int
    last: int
    begin: int
    end: int


class Part(NamedTuple):
    """The tokens of a branch between two offsets of its session."""

    branch: str
    begin: int
    end: int = LARGEST_INT64


def spans_of(connection: Connection, session: Session, first: int, last: int) -> list[Span]:
    """Return where turns of a session are, with the parts of their messages. Errors: TURN_NOT_FOUND for one that it
    does not have."""
    for number in (first, last):
        if not 1 <= number <= session.head:
            raise turn_not_found(session.session_id, number)
    return _spans(connection, session.stretches, first, last)


def spans_of_key(connection: Connection, tenant: str, key: str) -> tuple[list[Span], str]:
    """Return where the turn of a key is, with the parts of its message, and the bank of its session. Errors:
    TURN_NOT_FOUND."""
    place = turn_rows.keyed(connection, tenant, key)
    owner = None if place is None else session_rows.branch(connection, place.branch)
    if place is None or owner is None:
        raise turn_not_found("", key)
    line = session_rows.line(connection, place.branch, place.number)
    found = _spans(connection, line, place.number, place.number)
    return found, session_rows.bank_of(connection, owner.session_id)


def _spans(connection: Connection, line: Sequence[Stretch], first: int, last: int) -> list[Span]:
    while first > 1 and _is_part(connection, line, first - 1):
        first -= 1
    while last < line[-1].last and _is_part(connection, line, last):
        last += 1
    found, before = list[Span](), 0
    for stretch in line:
        begin, end = max(first, before + 1), min(last, stretch.last)
        before = stretch.last
        if begin <= end:
            found.append(_span(connection, stretch.branch, begin, end))
    return found


def _is_part(connection: Connection, line: Sequence[Stretch], number: int) -> bool:
    """Tell whether a turn has a part of a message whose answer is in a later one."""
    branch = next(stretch.branch for stretch in line if number <= stretch.last)
    statement = "SELECT 1 FROM turns WHERE branch = ? AND number = ? AND status = 'part'"
    return raw(connection).execute(statement, (branch, number)).fetchone() is not None


def _span(connection: Connection, branch: str, first: int, last: int) -> Span:
    ends = raw(connection).execute(_ENDS, (branch, first, last)).fetchall()
    if not ends:
        raise turn_not_found("", first)
    return Span(branch, first, last, int(ends[0][0]), int(ends[-1][1]))


def blank_some(connection: Connection, span: Span, most: int) -> Gone:
    """Take all but number, start and count of tokens from at most `most` turns that have it yet."""
    found = turn_rows.to_blank(connection, span.branch, span.first, span.last, most)
    for row in found:
        turn_rows.blank(connection, row, secrets.token_hex(16))
    size = sum(row["size"] - ROW_BYTES for row in found)
    session_rows.add_bytes(connection, span.branch, -size)
    return Gone(len(found), sum(row["token_count"] for row in found), size)


def behind(connection: Connection, span: Span) -> list[Part]:
    """Return the parts of branches that go on behind the first of some turns, their own too."""
    asked = {"branch": span.branch, "first": span.first}
    found = raw(connection).execute(_BEHIND, asked).fetchall()
    return [Part(span.branch, span.end), *(Part(str(branch), int(begin)) for branch, begin in found)]


def fence(connection: Connection, spans: Iterable[Span]) -> dict[str, str]:
    """End the leases of all sessions that have some of the turns, so that a worker that has them in its mind is
    refused, and delete the windows of these sessions; return the name of the file of each, "" for none."""
    having: dict[str, str] = {}
    for span in spans:
        branches = [part.branch for part in behind(connection, span)[1:]]
        asked = {"branch": span.branch, "first": span.first, "behind": json.dumps(branches)}
        having |= dict(raw(connection).execute(_HAVE_THEM, asked).fetchall())
    files = {}
    for session_id, tenant in having.items():
        session = session_rows.get(connection, tenant, session_id, NEVER)
        session_rows.save(connection, rules.fenced(session))
        files[session_id] = window_rows.delete(connection, session_id)
    return files


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
