"""The check of sessions: every record of a session, a branch and a turn is as it was written, and every session has all
its turns. Windows are a cache, and are not looked at.

Nothing here is mended: a session or a turn that is damaged is refused by its name, and stays as it is.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import Connection

from memory_service.care.folder import Folder
from memory_service.care.report import Findings
from memory_service.domain.errors import ServiceError
from memory_service.domain.sessions import Session
from memory_service.storage.local.records import clock_rows, forgetting_rows, session_rows, turn_rows
from memory_service.storage.local.records.schema import raw
from memory_service.storage.sessions.session_row import Branch

_OWNERLESS = "SELECT count(*) FROM turns WHERE branch NOT IN (SELECT branch FROM branches)"


def check(folder: Folder, findings: Findings, *, fast: bool) -> None:
    """Add to the findings what is wrong with sessions. fast: whether to leave out the token ids of turns."""
    with folder.read() as connection:
        sessions = dict(_sessions(connection, findings))
        branches = dict(_branches(connection, findings))
        now = max(time.time_ns() // 1000, mark.now if (mark := clock_rows.mark(connection)) else 0)
        for session in sessions.values():
            if session.expires is not None and session.expires <= now:
                continue  # nobody can read it any more, and some of its turns may be gone already
            for text in _flaws(connection, session):
                findings.add("session", f"session {session.session_id}: {text}")
        going = forgetting_rows.branches_going(connection)
        for branch in branches.values():
            if branch.session_id not in sessions and not {branch.branch, f"of {branch.tenant}"} & going:
                findings.add(
                    "session", f"the branch {branch.branch} is of the session {branch.session_id}, which is lost"
                )
        if lost := raw(connection).execute(_OWNERLESS).fetchone()[0]:
            findings.add("session", f"{lost} turns are of no session")
        turns = sum(1 for _ in _turns(connection, branches, findings, fast=fast))
    if sessions:
        findings.totals.update(sessions=len(sessions), turns=turns)


def _sessions(connection: Connection, findings: Findings) -> Iterator[tuple[str, Session]]:
    for row in raw(connection).execute(session_rows.SELECT_SESSIONS).fetchall():
        if (session := session_rows.session_of(row)) is None:
            findings.add("session", f"session {_text(row[0])}: its record is not as it was written")
        else:
            yield session.session_id, session


def _branches(connection: Connection, findings: Findings) -> Iterator[tuple[str, Branch]]:
    for row in raw(connection).execute(session_rows.SELECT_BRANCHES).fetchall():
        try:
            yield _text(row[0]), session_rows.branch_of(row)
        except ServiceError:
            text = f"session {_text(row[1])}: the record of its branch {_text(row[0])} is not as it was written"
            findings.add("session", text)


def _flaws(connection: Connection, session: Session) -> Iterator[str]:
    """Yield what is wrong with the line of a session. What is wrong with a single turn is found by itself."""
    try:
        line = session_rows.line(connection, session.branch, session.head)
    except ServiceError:
        yield "one of its branches is damaged, or lost"
        return
    after = 0
    for stretch in line:
        found = turn_rows.count(connection, stretch.branch, after, stretch.last)[0]
        if found != stretch.last - after:
            yield f"of its turns {after + 1} to {stretch.last} there are {found}"
        after = stretch.last


def _turns(connection: Connection, branches: Mapping[str, Branch], findings: Findings, *, fast: bool) -> Iterator[None]:
    for row in raw(connection).execute(turn_rows.SELECT_TURNS if not fast else turn_rows.SELECT_SHORT_TURNS):
        branch = branches.get(_text(row[turn_rows.BRANCH]))
        try:
            turn_rows.turn_of(row, branch.session_id if branch else "")
        except ServiceError as error:
            findings.add("turn", f"session {error.metadata['session']}, turn {error.metadata['turn']}: {_NOT_WRITTEN}")
        yield


_NOT_WRITTEN = "its record is not as it was written"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
