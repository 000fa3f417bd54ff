"""What the rows of a session and of its branches say. This file owns that a row which is not as it was written is never
made a session of: each is compared with its checksum."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import xxhash

from memory_service.domain.errors import ServiceError
from memory_service.domain.sessions import Lease, Session, Stretch, TurnPoint

# A moment before which no session expires.
NEVER = -1
# A leap of the clock moves these, and so they are not covered by the checksum.
_MOVED = ("expires", "lease_expires")


class Branch(NamedTuple):
    """A branch of turns, which goes on behind the turn `cut_turn` of its parent, if it has one."""

    branch: str
    session_id: str
    tenant: str
    parent: str | None = None
    cut_turn: int = 0
    cut_tokens: int = 0
    bytes: int = 0


def row_of(session: Session) -> dict[str, Any]:
    """Return the row of a session, by column; lists and maps are JSON, and a name that there is not is None."""
    row: dict[str, Any] = {
        "session_id": session.session_id,
        "tenant": session.tenant,
        "name": session.name or None,
        "bank": session.bank,
        "reads": json.dumps(session.reads),
        "reader_digest": session.reader_digest,
        "settings": json.dumps(dict(session.settings)),
        "meta": json.dumps(dict(session.metadata)),
        "ttl": session.ttl,
        "branch": session.branch,
        "head": session.head,
        "tokens": session.tokens,
        "forked_session": session.forked_from and session.forked_from.session_id,
        "forked_turn": session.forked_from and session.forked_from.turn,
        "created": session.created,
        "updated": session.updated,
        "expires": session.expires,
        "epoch": session.epoch,
        "holder": session.lease and session.lease.holder,
        "lease_expires": session.lease and session.lease.expires,
        "lease_ttl": session.lease and session.lease.ttl,
    }
    return row | {"checksum": _checksum(row)}


def session_of(row: Mapping[str, Any]) -> Session | None:
    """Make the value of a row, without its stretches; None for a row that is not as it was written."""
    try:
        return _session(row) if row["checksum"] == _checksum(row) else None
    except (ValueError, TypeError, KeyError):
        return None


def branch_checksum(branch: Branch) -> bytes:
    """Return the checksum of all of a branch but its bytes, which the database counts up."""
    return xxhash.xxh3_64_digest(json.dumps(branch[:-1]).encode())


def line_of(ancestry: Iterable[Branch], name: str, last: int, end: int | None) -> tuple[Stretch, ...]:
    """Return the stretches, first to last, by which one comes to the turn `last` of a branch. ancestry: the branch and
    what it goes on behind, the last first. end: the tokens up to that turn, where it is not the last. Errors:
    SESSION_NOT_FOUND where a branch is not there any more."""
    found = [Stretch(name, last, end)]
    for at in ancestry:
        if at.parent is None:
            return tuple(reversed(found))
        found.append(Stretch(at.parent, at.cut_turn, at.cut_tokens))
    raise ServiceError("SESSION_NOT_FOUND", f"the branch {found[-1].branch} of a session is not there")


def _checksum(row: Mapping[str, Any]) -> bytes:
    said = [value for name, value in row.items() if name not in (*_MOVED, "checksum")]
    return xxhash.xxh3_64_digest(json.dumps(said).encode())


def _session(row: Mapping[str, Any]) -> Session:
    lease = None
    if row["holder"] is not None:
        lease = Lease(row["holder"], row["epoch"], int(row["lease_expires"]), row["lease_ttl"])
    forked = row["forked_session"]
    return Session(
        session_id=row["session_id"],
        name=row["name"] or "",
        bank=row["bank"],
        reads=tuple(json.loads(row["reads"])),
        reader_digest=row["reader_digest"],
        settings=json.loads(row["settings"]),
        metadata=json.loads(row["meta"]),
        ttl=row["ttl"],
        tenant=row["tenant"],
        branch=row["branch"],
        head=row["head"],
        tokens=row["tokens"],
        forked_from=None if forked is None else TurnPoint(forked, row["forked_turn"]),
        created=row["created"],
        updated=row["updated"],
        expires=row["expires"],
        epoch=row["epoch"],
        lease=lease,
    )


# The columns of a session, in the order in which the checksum covers them.
COLUMNS = tuple(row_of(Session("", "", "")))
# Those of a branch.
BRANCH_COLUMNS = (*Branch._fields, "checksum")
