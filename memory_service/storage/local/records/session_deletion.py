"""The deletion of the rows of a session. This file owns that a turn stays for as long as a fork has it, and no longer.

A function of this file runs in a transaction of the writer.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection

from memory_service.domain.sessions import Deleted
from memory_service.storage.local.records import session_rows, turn_rows
from memory_service.storage.local.records.schema import raw
from memory_service.storage.local.records.session_rows import Branch


def delete(connection: Connection, session_id: str) -> Deleted:
    """Delete a session with its turns, but for those that forks have, which become turns of the fork that has most of
    them. Errors: CHECKSUM_MISMATCH for a damaged branch."""
    own = session_rows.branches_of(connection, session_id)
    heirs = _heirs(own, session_rows.children_of(connection, session_id))
    turns = tokens = size = kept = 0
    for name, branch in own.items():
        heir, last = heirs.get(name, ("", branch.cut_turn))
        gone = turn_rows.count(connection, name, last)
        turns, tokens, size = turns + gone[0], tokens + gone[1], size + gone[2]
        turn_rows.delete(connection, name, last)
        if heir:
            kept += last - branch.cut_turn
            session_rows.give_branch(connection, branch, heir)
            session_rows.add_bytes(connection, name, -gone[2])
        else:
            session_rows.delete_branch(connection, name)
    session_rows.delete(connection, session_id)
    return Deleted(turns, tokens, size, kept)


def delete_all_of(connection: Connection, tenant: str) -> None:
    """Delete all sessions of a tenant, with all their turns."""
    for table in ("turns", "branches", "windows", "sessions"):
        raw(connection).execute(f"DELETE FROM {table} WHERE tenant = ?", (tenant,))


def _heirs(own: Mapping[str, Branch], children: Sequence[Branch]) -> dict[str, tuple[str, int]]:
    """Return, of the branches of a session, those of which other sessions have turns: the session that has most of
    them, and its last one. children: the branches that go on behind one of these."""
    heirs: dict[str, tuple[str, int]] = {}
    # Those of other sessions first; then, step by step, own ones that stay because of them.
    waiting = [child for child in children if child.branch not in own]
    while waiting:
        child = waiting.pop()
        assert child.parent is not None
        owner = heirs[child.branch][0] if child.branch in own else child.session_id
        before = heirs.get(child.parent)
        if before is None or before[1] < child.cut_turn:
            heirs[child.parent] = (owner, child.cut_turn)
        if before is None and (parent := own[child.parent]).parent in own:
            waiting.append(parent)
    return heirs
