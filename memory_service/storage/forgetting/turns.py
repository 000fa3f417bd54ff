"""Turns that are forgotten: which rows they are, which sessions have them, and what is left of each. A function that
changes rows runs in a transaction that changes, one that only reads also in one that reads."""

import secrets
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection

from memory_service.domain import sessions as rules
from memory_service.domain.errors import ServiceError, turn_not_found
from memory_service.domain.sessions import Session, Stretch
from memory_service.storage.forgetting.parts import Part, Span
from memory_service.storage.forgetting.rows import ForgettingRows
from memory_service.storage.sessions.session_row import NEVER
from memory_service.storage.sessions.turn_row import ROW_BYTES, Gone


def spans_of(rows: ForgettingRows, connection: Connection, session: Session, first: int, last: int) -> list[Span]:
    """Return where turns of a session are, with the parts of their messages. Errors: TURN_NOT_FOUND for one that it
    does not have."""
    for number in (first, last):
        if not 1 <= number <= session.head:
            raise turn_not_found(session.session_id, number)
    return _spans(rows, connection, session.stretches, first, last)


def spans_of_key(
    rows: ForgettingRows, connection: Connection, tenant: str, key: str, now: int
) -> tuple[list[Span], str]:
    """Return where the turn of a key is, with the parts of its message, and the bank of its session. Errors:
    TURN_NOT_FOUND, also where that session has expired by now."""
    sessions = rows.sessions.sessions
    place = rows.sessions.turns.keyed(connection, tenant, key)
    owner = None if place is None else sessions.branch(connection, place.branch)
    if place is None or owner is None:
        raise turn_not_found("", key)
    try:
        session = sessions.get(connection, tenant, owner.session_id, now)
    except ServiceError as error:
        raise turn_not_found("", key) if error.reason == "SESSION_NOT_FOUND" else error from None
    line = sessions.line(connection, place.branch, place.number)
    return _spans(rows, connection, line, place.number, place.number), session.bank


def _spans(rows: ForgettingRows, connection: Connection, line: Sequence[Stretch], first: int, last: int) -> list[Span]:
    def is_part(number: int) -> bool:
        branch = next(stretch.branch for stretch in line if number <= stretch.last)
        return rows.turns.is_part(connection, branch, number)

    while first > 1 and is_part(first - 1):
        first -= 1
    while last < line[-1].last and is_part(last):
        last += 1
    found, before = list[Span](), 0
    for stretch in line:
        begin, end = max(first, before + 1), min(last, stretch.last)
        before = stretch.last
        if begin <= end:
            ends = rows.turns.ends(connection, stretch.branch, begin, end)
            if not ends:
                raise turn_not_found("", begin)
            found.append(Span(stretch.branch, begin, end, ends[0][0], ends[-1][1]))
    return found


def blank_some(rows: ForgettingRows, connection: Connection, span: Span, most: int) -> Gone:
    """Take all but number, start and count of tokens from at most `most` turns that have it yet."""
    turns = rows.sessions.turns
    found = turns.to_blank(connection, span.branch, span.first, span.last, most)
    for row in found:
        turns.blank(connection, row, secrets.token_hex(16))
    size = sum(row["size"] - ROW_BYTES for row in found)
    rows.sessions.sessions.add_bytes(connection, span.branch, -size)
    return Gone(len(found), sum(row["token_count"] for row in found), size)


def behind(rows: ForgettingRows, connection: Connection, span: Span) -> list[Part]:
    """Return the parts of branches that go on behind the first of some turns, their own too."""
    return [Part(span.branch, span.end), *rows.turns.behind(connection, span.branch, span.first)]


def fence(rows: ForgettingRows, connection: Connection, spans: Iterable[Span]) -> dict[str, str]:
    """End the leases of all sessions that have some of the turns, so that a worker that has them in its mind is
    refused, and delete the windows of these sessions; return the name of the file of each, "" for none."""
    having: dict[str, str] = {}
    for span in spans:
        branches = [part.branch for part in rows.turns.behind(connection, span.branch, span.first)]
        having |= rows.turns.having(connection, span.branch, span.first, branches)
    files = {}
    for session_id, tenant in having.items():
        session = rows.sessions.sessions.get(connection, tenant, session_id, NEVER)
        rows.sessions.sessions.save(connection, rules.fenced(session))
        files[session_id] = rows.sessions.windows.delete(connection, session_id)
    return files
