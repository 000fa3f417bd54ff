"""The deletion of the rows of a session. This file owns that a turn stays for as long as a fork has it, and no longer.

A function of this file runs in a transaction that changes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection

from memory_service.storage.sessions.rows import Rows
from memory_service.storage.sessions.session_row import Branch
from memory_service.storage.sessions.turn_row import Gone


class Left(NamedTuple):
    """What a deleted session has left of a branch: its turns behind the number `after`, before which there are `begin`
    tokens, are to be deleted, and the branch too where it has no `heir`, the session that has the turns before."""

    branch: str
    after: int
    begin: int
    heir: str


def delete(rows: Rows, connection: Connection, session_id: str) -> tuple[list[Left], int]:
    """Delete a session without its turns; what forks have of it becomes that of the fork which has most. Returns what
    is left to delete, and how many turns stay. Errors: CHECKSUM_MISMATCH for a damaged branch."""
    own = rows.sessions.branches_of(connection, session_id)
    heirs = _heirs(own, rows.sessions.children_of(connection, session_id))
    left, kept = list[Left](), 0
    for name, branch in own.items():
        heir = heirs.get(name)
        if heir is None:
            left.append(Left(name, branch.cut_turn, branch.cut_tokens, ""))
            continue
        kept += heir.after - branch.cut_turn
        rows.sessions.give_branch(connection, branch, heir.heir)
        left.append(heir)
    rows.sessions.delete(connection, session_id)
    return left, kept


def shorten(rows: Rows, connection: Connection, session_id: str, most: int) -> bool:
    """Delete at most `most` turns that a session leaves to none of its forks, and return whether there were any. The
    session and its branches stay."""
    own = rows.sessions.branches_of(connection, session_id)
    heirs = _heirs(own, rows.sessions.children_of(connection, session_id))
    left = most
    for name, branch in own.items():
        after = heirs[name].after if name in heirs else branch.cut_turn
        left -= rows.turns.clear_some(connection, name, after, left).turns
        if not left:
            break
    return left < most


def clear_some(rows: Rows, connection: Connection, left: Left, most: int) -> Gone:
    """Delete at most `most` turns of what is left of a branch, and the branch behind the last of them, where no heir
    has it."""
    gone = rows.turns.clear_some(connection, left.branch, left.after, most)
    if not gone.turns and not left.heir:
        rows.sessions.delete_branch(connection, left.branch)
    return gone


def _heirs(own: Mapping[str, Branch], children: Sequence[Branch]) -> dict[str, Left]:
    """Return, of the branches of a session, those of which other sessions have turns, with the session that has most of
    them. children: the branches that go on behind one of these."""
    heirs: dict[str, Left] = {}
    # Those of other sessions first; then, step by step, own ones that stay because of them.
    waiting = [child for child in children if child.branch not in own]
    while waiting:
        child = waiting.pop()
        assert child.parent is not None
        owner = heirs[child.branch].heir if child.branch in own else child.session_id
        before = heirs.get(child.parent)
        if before is None or before.after < child.cut_turn:
            heirs[child.parent] = Left(child.parent, child.cut_turn, child.cut_tokens, owner)
        if before is None and (parent := own[child.parent]).parent in own:
            waiting.append(parent)
    return heirs
