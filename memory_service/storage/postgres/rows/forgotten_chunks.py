"""The rows of chunks that are forgotten: which go because of forgotten turns or of a filter, also of those that are
gone already, and their deletion without a trace. The caller has the lock of the bank's row where rows of chunks go."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection

from memory_service.domain.model import Filter
from memory_service.storage.chunks.removed import Removed
from memory_service.storage.forgetting.parts import Chosen, Forgotten
from memory_service.storage.postgres.database import raw
from memory_service.storage.postgres.rows import conditions

_FOUND = """
    SELECT chunk_id, tags ->> 'branch', start, original_length, payload::jsonb -> 1 ->> 'context' FROM chunks
    WHERE bank_id = %s AND jsonb_typeof(tags -> 'branch') = 'string' AND tags ->> 'branch' = ANY(%s)
"""
_LOGGED = """
    SELECT chunk_id, meta::jsonb ->> 'branch', start, stored_length, '' FROM evictions
    WHERE bank_id = %s AND jsonb_typeof(meta::jsonb -> 'branch') = 'string' AND meta::jsonb ->> 'branch' = ANY(%s)
"""
_GONE = "SELECT chunk_id, start, created, meta FROM evictions WHERE bank_id = %s"
_PASSING = """
    SELECT chunk_id FROM (
        SELECT chunk_id, created, start, pinned, words::jsonb AS tags
        FROM unnest(%s::int8[], %s::int8[], %s::int8[], %s::bool[], %s::text[])
        AS given(chunk_id, created, start, pinned, words)
    ) AS gone WHERE
"""
_DELETE = """
    DELETE FROM chunks WHERE bank_id = %s AND chunk_id = ANY(%s)
    RETURNING chunk_id, stored_length, size, payload, key
"""
_PAYLOADS = "SELECT chunk_id, payload FROM chunks WHERE bank_id = %s ORDER BY chunk_id LIMIT %s"
_ASIDE = "SELECT chunk_id, record, (record::jsonb -> 'tags')::text FROM quarantine WHERE uid = %s"
_DELETED_ASIDE = "SELECT DISTINCT uid FROM quarantine WHERE uid NOT IN (SELECT uid FROM banks)"


class Aside(NamedTuple):
    """A chunk that was taken out of service, with its row, and its metadata as filters are held against them."""

    chunk_id: int
    row: dict[str, Any]
    tags: str


def chosen(connection: Connection, forgotten: Forgotten, bank_id: int) -> Chosen:
    """Find the chunks of a bank that go because of forgotten turns."""
    return _chosen(connection, _FOUND, forgotten, bank_id)


def logged(connection: Connection, forgotten: Forgotten, bank_id: int) -> list[int]:
    """Find the chunks of forgotten tokens that were evicted, and of which the log of evictions tells."""
    return _chosen(connection, _LOGGED, forgotten, bank_id).of_them


def _chosen(connection: Connection, statement: str, forgotten: Forgotten, bank_id: int) -> Chosen:
    found = Chosen([], [])
    for chunk_id, *said in raw(connection).execute(statement, (bank_id, forgotten.branches)).fetchall():
        why = forgotten.why(*said)
        if why is not None:
            (found.of_them if why == "of them" else found.attended).append(chunk_id)
    return found


def gone_matching(connection: Connection, bank_id: int, uid: str, where: Filter) -> list[int]:
    """Find the chunks of a bank that a filter lets pass, and that were evicted, as far as the log tells, or taken out
    of service."""
    rows = [
        (chunk_id, created, start, False, conditions.tags(json.loads(meta)))
        for chunk_id, start, created, meta in raw(connection).execute(_GONE, (bank_id,)).fetchall()
    ]
    rows += [
        (each.chunk_id, each.row["created"], each.row["start"], each.row["pinned"], each.tags)
        for each in aside(connection, uid)
    ]
    values: list[Any] = [list(column) for column in zip(*rows, strict=True)] or [[]] * 5
    statement = f"{_PASSING} {conditions.passing(where, values)}"
    return [chunk_id for (chunk_id,) in raw(connection).execute(statement, values).fetchall()]


def forget(connection: Connection, bank_id: int, chunk_ids: Sequence[int]) -> tuple[Removed, dict[int, str | None]]:
    """Delete chunks with their keys, so that nothing tells that they were there; return them, and the descriptors of
    their payloads."""
    driver, asked = raw(connection), (bank_id, list(chunk_ids))
    rows = driver.execute(_DELETE, asked, binary=True).fetchall()
    driver.execute("DELETE FROM chunk_use WHERE chunk_id = ANY(%s)", asked[1:])
    driver.execute("DELETE FROM keys WHERE bank_id = %s AND key = ANY(%s)", (bank_id, [row[4] for row in rows]))
    removed = Removed([row[0] for row in rows], sum(row[1] for row in rows), sum(row[2] for row in rows))
    return removed, {chunk_id: payload for chunk_id, _, _, payload, _ in rows}


def forget_logged(connection: Connection, bank_id: int, chunk_ids: Sequence[int]) -> int:
    """Delete what is told of chunks that are gone: from the log of evictions, whose number is returned, and their
    keys."""
    driver, asked = raw(connection), (bank_id, list(chunk_ids))
    driver.execute("DELETE FROM keys WHERE bank_id = %s AND gone IS NOT NULL AND chunk_id = ANY(%s)", asked)
    return driver.execute("DELETE FROM evictions WHERE bank_id = %s AND chunk_id = ANY(%s)", asked).rowcount


def payloads_of(connection: Connection, bank_id: int, most: int) -> list[tuple[int, str | None]]:
    """Read ids of chunks of a bank, at most `most` of them, ascending, and the descriptors of their payloads."""
    return [(chunk_id, text) for chunk_id, text in raw(connection).execute(_PAYLOADS, (bank_id, most)).fetchall()]


def aside(connection: Connection, uid: str) -> list[Aside]:
    """Read the chunks of a bank that were taken out of service."""
    found = raw(connection).execute(_ASIDE, (uid,)).fetchall()
    return [Aside(chunk_id, json.loads(row), tags) for chunk_id, row, tags in found]


def forget_aside(connection: Connection, uid: str, goes: Callable[[Aside], bool]) -> list[int]:
    """Delete those of the chunks of a bank that were taken out of service which go, and return their ids."""
    ids = [each.chunk_id for each in aside(connection, uid) if goes(each)]
    raw(connection).execute("DELETE FROM quarantine WHERE uid = %s AND chunk_id = ANY(%s)", (uid, ids))
    return ids


def deleted_banks_aside(connection: Connection) -> list[str]:
    """Return the uids of deleted banks of which chunks were taken out of service."""
    return [uid for (uid,) in raw(connection).execute(_DELETED_ASIDE).fetchall()]
