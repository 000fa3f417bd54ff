"""The rows of turns. A function that changes them runs in a transaction of the writer, one that only reads also in that
of a reader.

This file owns that a turn which is not as it was written is refused by its number, and never answered: the row has a
checksum, and the token ids, which are often left unread, have another one.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple
from typing import Any, NamedTuple

import xxhash
from sqlalchemy import Connection

from memory_service.domain.errors import damaged_turn
from memory_service.domain.sessions import Item, Stretch, Turn
from memory_service.domain.validate import LARGEST_INT64
from memory_service.storage.local.records import bytes_rows, session_rows
from memory_service.storage.local.records.schema import TurnRow, raw

# What a turn counts beside its words and token ids: its row, and that in the indexes.
ROW_BYTES = 256
_COLUMNS = (
    *("tenant", "key", "branch", "number", "start", "status", "token_count", "prompt_tokens", "kept", "created"),
    *("size", "digest", "content", "checksum"),
)
_read = bytes_rows.reader(TurnRow.__table__, _COLUMNS)
_INSERT = f"""
    INSERT INTO turns ({", ".join(_COLUMNS)}, token_ids)
    VALUES ({", ".join(f":{name}" for name in _COLUMNS)}, :token_ids)
"""
_STRETCH = "WHERE branch = ? AND number > ? AND number <= ? ORDER BY number"


class Prepared(NamedTuple):
    """A turn with what its row needs that does not go by its place, made before the writer's thread is held up."""

    turn: Turn
    content: bytes
    digest: bytes
    ids_checksum: bytes

    @property
    def size(self) -> int:
        """Return the bytes that the turn counts."""
        return len(self.content) + len(self.turn.token_ids) + ROW_BYTES


class Keyed(NamedTuple):
    """The turn that has a key: its branch, its number, and the digest of what its caller said."""

    branch: str
    number: int
    digest: bytes


class Place(NamedTuple):
    """Where a turn ends: its branch, its number, and the tokens of the session up to and with it."""

    branch: str
    number: int
    tokens: int


def prepared(turn: Turn) -> Prepared:
    """Make what the row of a turn needs; see `Prepared`."""
    said = {"items": [astuple(item) for item in turn.items], "usage": dict(turn.usage), "meta": dict(turn.metadata)}
    content = json.dumps(said, sort_keys=True, ensure_ascii=False).encode()
    # Of ASCII, as turns had it that were written before texts of other letters were kept as they are.
    hasher = xxhash.xxh3_128(json.dumps(said, sort_keys=True).encode())
    hasher.update(f"{turn.status} {turn.prompt_tokens} {turn.kept} {turn.token_count} ".encode())
    hasher.update(turn.token_ids)
    return Prepared(turn, content, hasher.digest(), xxhash.xxh3_64_digest(turn.token_ids))


def insert(connection: Connection, tenant: str, branch: str, made: Prepared, placed: Turn) -> None:
    """Insert a turn, whose number and key the caller knows to be free. placed: with its place, time and key."""
    row = {
        "tenant": tenant,
        "key": placed.key,
        "branch": branch,
        "number": placed.number,
        "start": placed.start,
        "status": placed.status,
        "token_count": placed.token_count,
        "prompt_tokens": placed.prompt_tokens,
        "kept": placed.kept,
        "created": placed.created,
        "size": made.size,
        "digest": made.digest,
        "content": made.content,
    }
    checksum = _checksum(row) + made.ids_checksum
    raw(connection).execute(_INSERT, row | {"checksum": checksum, "token_ids": placed.token_ids})


def keyed(connection: Connection, tenant: str, key: str) -> Keyed | None:
    """Find the turn that has a key; None where it is free."""
    names = bytes_rows.selected(("branch", "number", "digest"))
    statement = f"SELECT {names} FROM turns WHERE tenant = ? AND key = ?"
    row = raw(connection).execute(statement, (tenant, key)).fetchone()
    if row is None:
        return None
    branch, number, digest = row
    return Keyed(branch.decode(errors="replace"), int(number) if number.isdigit() else 0, digest)


def place(connection: Connection, branch: str, number: int) -> Place | None:
    """Find where a turn of a branch ends; None where there is no such turn. Errors: CHECKSUM_MISMATCH."""
    found = next(_turns(connection, "WHERE branch = ? AND number = ?", (branch, number), "", False), None)
    return None if found is None else Place(branch, number, found.start + found.token_count)


def get(connection: Connection, tenant: str, key: str, *, token_ids: bool) -> Turn | None:
    """Read the turn that has a key; None where there is none. Errors: CHECKSUM_MISMATCH."""
    found = keyed(connection, tenant, key)
    if found is None:
        return None
    owner = session_rows.branch(connection, found.branch)
    session_id = "" if owner is None else owner.session_id
    return next(_turns(connection, "WHERE tenant = ? AND key = ?", (tenant, key), session_id, token_ids), None)


def of_line(connection: Connection, line: Sequence[Stretch], after: int, *, token_ids: bool) -> Iterator[Turn]:
    """Read the turns of some stretches, first to last, from the first one behind the number `after`. Errors:
    CHECKSUM_MISMATCH for a turn that is damaged or missing."""
    for stretch in line:
        if stretch.last <= after:
            continue
        owner = session_rows.branch(connection, stretch.branch)
        session_id = "" if owner is None else owner.session_id
        for turn in _turns(connection, _STRETCH, (stretch.branch, after, stretch.last), session_id, token_ids):
            if turn.number != after + 1:
                raise damaged_turn(session_id, after + 1)
            yield turn
            after = turn.number
        if after != stretch.last:
            raise damaged_turn(session_id, after + 1)


def count(connection: Connection, branch: str, after: int, last: int = LARGEST_INT64) -> tuple[int, int, int]:
    """Count the turns of a branch behind the number `after` up to `last`, their tokens, and what they count in
    bytes."""
    statement = """
        SELECT count(*), coalesce(sum(token_count), 0), coalesce(sum(size), 0) FROM turns
        WHERE branch = ? AND number > ? AND number <= ?
    """
    found: tuple[int, int, int] = raw(connection).execute(statement, (branch, after, last)).fetchone()
    return found


def to_blank(connection: Connection, branch: str, first: int, last: int, most: int) -> list[dict[str, Any]]:
    """Read the rows of at most `most` turns of a branch that are not forgotten, without what was said in them."""
    names = ("turn_id", "tenant", "branch", "number", "start", "token_count", "kept", "created", "size")
    statement = f"""
        SELECT {", ".join(names)} FROM turns
        WHERE branch = ? AND number >= ? AND number <= ? AND status != 'forgotten' ORDER BY number LIMIT ?
    """
    found = raw(connection).execute(statement, (branch, first, last, most)).fetchall()
    return [dict(zip(names, row, strict=True)) for row in found]


def blank(connection: Connection, row: Mapping[str, Any], key: str) -> None:
    """Leave of a turn its number, start and count of tokens, under another key. row: as `to_blank` has read it."""
    blank = prepared(Turn("forgotten", (), b""))
    left: dict[str, Any] = {**row, "key": key, "status": "forgotten", "prompt_tokens": 0, "size": ROW_BYTES}
    left |= {"digest": b"", "content": blank.content, "token_ids": b""}
    left["checksum"] = _checksum(left) + blank.ids_checksum
    names = ("key", "status", "prompt_tokens", "size", "digest", "content", "token_ids", "checksum")
    changes = ", ".join(f"{name} = :{name}" for name in names)
    raw(connection).execute(f"UPDATE turns SET {changes} WHERE turn_id = :turn_id", left)


def delete(connection: Connection, branch: str, after: int) -> None:
    """Delete the turns of a branch behind the number `after`."""
    raw(connection).execute("DELETE FROM turns WHERE branch = ? AND number > ?", (branch, after))


def _turns(
    connection: Connection, where: str, values: tuple[object, ...], session_id: str, token_ids: bool
) -> Iterator[Turn]:
    ids = "CAST(token_ids AS BLOB)" if token_ids else "NULL"
    with closing(
        raw(connection).execute(f"SELECT {bytes_rows.selected(_COLUMNS)}, {ids} FROM turns {where}", values)
    ) as rows:
        for row in rows:
            yield turn_of(row, session_id)


# What reads the rows that `turn_of` takes.
SELECT_TURNS = f"SELECT {bytes_rows.selected((*_COLUMNS, 'token_ids'))} FROM turns"
SELECT_SHORT_TURNS = f"SELECT {bytes_rows.selected(_COLUMNS)}, NULL FROM turns"
# The place of the branch in such a row.
BRANCH = _COLUMNS.index("branch")


def turn_of(row: Sequence[Any], session_id: str) -> Turn:
    """Make the value of a row of `SELECT_TURNS`, whose token ids may be None. session_id: that of its branch. Errors:
    CHECKSUM_MISMATCH."""
    try:
        found, ids = _read(row), row[-1]
        if found["checksum"][:8] != _checksum(found) or (ids is not None and _ids_flaw(ids, found)):
            raise ValueError("it is not as it was written")
        return _turn(found, ids or b"", session_id)
    except (ValueError, TypeError, KeyError, struct.error):
        number = row[_COLUMNS.index("number")] or b""
        raise damaged_turn(session_id, int(number) if number.isdigit() else 0) from None


def _ids_flaw(ids: bytes, row: Mapping[str, Any]) -> bool:
    count = 0 if row["status"] == "forgotten" else row["token_count"]
    return bool(len(ids) != 4 * count or row["checksum"][8:] != xxhash.xxh3_64_digest(ids))


def _turn(row: Mapping[str, Any], ids: bytes, session_id: str) -> Turn:
    content = json.loads(row["content"])
    return Turn(
        status=row["status"],
        items=tuple(Item(*item) for item in content["items"]),
        token_ids=ids,
        prompt_tokens=row["prompt_tokens"],
        kept=row["kept"],
        usage=content["usage"],
        metadata=content["meta"],
        key=row["key"],
        number=row["number"],
        start=row["start"],
        token_count=row["token_count"],
        created=row["created"],
        session_id=session_id,
    )


def _checksum(row: Mapping[str, Any]) -> bytes:
    """Return the checksum of all columns but the token ids."""
    parts = [value.encode() if isinstance(value, str) else value for value in map(row.__getitem__, _COLUMNS[:-1])]
    hasher = xxhash.xxh3_64()
    for part in parts:
        data = part if isinstance(part, bytes) else struct.pack("<q", part)
        hasher.update(struct.pack("<q", len(data)))
        hasher.update(data)
    return hasher.digest()
