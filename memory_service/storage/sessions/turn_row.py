"""What the row of a turn says. This file owns that a turn which is not as it was written is refused by its number, and
never answered: the row has a checksum, and the token ids, which are often left unread, have another one."""

import json
import struct
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any, NamedTuple

import xxhash

from memory_service.domain.errors import damaged_turn
from memory_service.domain.sessions import Item, Turn

# What a turn counts beside its words and token ids: its row, and that in the indexes.
ROW_BYTES = 256
# The columns that a checksum covers, in its order, and the checksum.
COLUMNS = (
    *("tenant", "key", "branch", "number", "start", "status", "token_count", "prompt_tokens", "kept", "created"),
    *("size", "digest", "content", "checksum"),
)
# The columns that a turn loses when it is forgotten, and those that are asked for to blank it.
BLANKED = ("key", "status", "prompt_tokens", "size", "digest", "content", "token_ids", "checksum")
TO_BLANK = ("turn_id", "tenant", "branch", "number", "start", "token_count", "kept", "created", "size")


class Prepared(NamedTuple):
    """A turn with what its row needs that does not go by its place, made before a transaction is held up."""

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


class Gone(NamedTuple):
    """How many turns went, or lost what was said in them, and how many tokens and bytes they had."""

    turns: int
    tokens: int
    size: int


def prepared(turn: Turn) -> Prepared:
    """Make what the row of a turn needs; see `Prepared`."""
    said = {"items": [astuple(item) for item in turn.items], "usage": dict(turn.usage), "meta": dict(turn.metadata)}
    content = json.dumps(said, sort_keys=True, ensure_ascii=False).encode()
    # Of ASCII, as turns had it that were written before texts of other letters were kept as they are.
    hasher = xxhash.xxh3_128(json.dumps(said, sort_keys=True).encode())
    hasher.update(f"{turn.status} {turn.prompt_tokens} {turn.kept} {turn.token_count} ".encode())
    hasher.update(turn.token_ids)
    return Prepared(turn, content, hasher.digest(), xxhash.xxh3_64_digest(turn.token_ids))


def row_of(tenant: str, branch: str, made: Prepared, placed: Turn) -> dict[str, Any]:
    """Return the row of a turn, by column. placed: with its place, time and key."""
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
    return row | {"checksum": _checksum(row) + made.ids_checksum, "token_ids": placed.token_ids}


def blanked(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return what is left of the row of a turn that is forgotten: number, start and count of tokens, under another key.
    row: its columns `TO_BLANK`."""
    blank = prepared(Turn("forgotten", (), b""))
    left: dict[str, Any] = {**row, "key": key, "status": "forgotten", "prompt_tokens": 0, "size": ROW_BYTES}
    left |= {"digest": b"", "content": blank.content, "token_ids": b""}
    return left | {"checksum": _checksum(left) + blank.ids_checksum}


def turn_of(row: Mapping[str, Any], ids: bytes | None, session_id: str) -> Turn:
    """Make the value of a row, whose token ids may be unread. session_id: that of its branch. Errors:
    CHECKSUM_MISMATCH."""
    try:
        if row["checksum"][:8] != _checksum(row) or (ids is not None and _ids_flaw(ids, row)):
            raise ValueError("it is not as it was written")
        return _turn(row, ids or b"", session_id)
    except (ValueError, TypeError, KeyError, struct.error):
        raise damaged_turn(session_id, row["number"]) from None


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
    parts = [value.encode() if isinstance(value, str) else value for value in map(row.__getitem__, COLUMNS[:-1])]
    hasher = xxhash.xxh3_64()
    for part in parts:
        data = part if isinstance(part, bytes) else struct.pack("<q", part)
        hasher.update(struct.pack("<q", len(data)))
        hasher.update(data)
    return hasher.digest()
