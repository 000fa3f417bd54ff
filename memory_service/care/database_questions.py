"""The questions about the rows of a database, each of which is one statement that finds what is wrong, with the
statement that mends it. They are those of `record_check`, in the same words.

This file owns that what is mended is looked for anew by the statement that mends, in the lock of the bank: services may
have changed it since it was found.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from memory_service.care.record_check import usage_said
from memory_service.care.report import Findings, Kind, Problem
from memory_service.domain.tenants import DEFAULT_TENANT, bank_title
from memory_service.storage.postgres.database import raw
from memory_service.storage.postgres.schema import BLOCK

# The rows of a deleted bank are being removed, bit by bit.
_KNOWN = "bank_id IN (SELECT bank_id FROM banks UNION ALL SELECT bank_id FROM gone_banks)"
_CHUNK = "SELECT 1 FROM chunks c WHERE c.bank_id = t.bank_id AND c.chunk_id = t.chunk_id"


@dataclass(frozen=True, slots=True)
class Question:
    """What may be wrong with rows: `found` selects the tenant, name and id of a bank and the id of a chunk, as far as
    it concerns these, then what `say` needs. mend: statements, which get the id of the bank where it concerns one."""

    kind: Kind
    found: str
    say: Callable[..., str]
    mend: tuple[str, ...]


def _said(text: str) -> Callable[..., str]:
    return lambda *_: text


_USAGE = """
    SELECT tenant, name, b.bank_id, NULL, b.chunks, b.tokens, b.bytes, h.chunks, h.tokens, h.bytes, b.counted
    FROM (
        SELECT *, chunks_written - chunks_evicted - chunks_deleted - chunks_quarantined - chunks_expired AS counted
        FROM banks
    ) b CROSS JOIN LATERAL (
        SELECT count(*) AS chunks,
            coalesce(sum(stored_length), 0)::int8 AS tokens, coalesce(sum(size), 0)::int8 AS bytes
        FROM chunks c WHERE c.bank_id = b.bank_id
    ) h WHERE (b.chunks, b.tokens, b.bytes, b.counted) <> (h.chunks, h.tokens, h.bytes, h.chunks)
"""
_RECOUNT = """
    UPDATE banks SET (chunks, tokens, bytes) = (
        SELECT count(*), coalesce(sum(stored_length), 0), coalesce(sum(size), 0)
        FROM chunks WHERE chunks.bank_id = %(bank)s
    ) WHERE bank_id = %(bank)s
"""
_WRITTEN = """
    UPDATE banks SET chunks_written = chunks + chunks_evicted + chunks_deleted + chunks_quarantined + chunks_expired
    WHERE bank_id = %(bank)s
"""
_TURNS = """
    branches t CROSS JOIN LATERAL (
        SELECT coalesce(sum(size), 0)::int8 AS bytes FROM turns WHERE turns.branch = t.branch
    ) h WHERE t.bytes <> h.bytes
"""
# First, because a statement that waits for a service sees only the rows of before that service has committed.
_LOCK_BRANCHES = f"SELECT FROM branches WHERE branch IN (SELECT t.branch FROM {_TURNS}) ORDER BY branch FOR UPDATE"
_RECOUNT_TURNS = f"""
    UPDATE branches SET bytes = f.bytes FROM (SELECT t.branch, h.bytes FROM {_TURNS}) f
    WHERE branches.branch = f.branch
"""
_CHUNKS = "SELECT tenant, name, c.bank_id, c.chunk_id FROM chunks c JOIN banks USING (bank_id)"
_SPENT = "EXISTS (SELECT 1 FROM keys k WHERE k.bank_id = c.bank_id AND k.key = c.key AND k.gone IS NOT NULL)"
# A repeated write of such a chunk would not be known for one.
_UNLED = """
    NOT EXISTS (
        SELECT 1 FROM keys k JOIN chunks n ON n.bank_id = k.bank_id AND n.chunk_id = k.chunk_id
        WHERE k.bank_id = c.bank_id AND k.key = c.key AND k.gone IS NULL)
"""
_RESTORE_KEYS = f"""
    INSERT INTO keys (bank_id, key, chunk_id, digest)
    SELECT bank_id, key, max(chunk_id), (array_agg(substring(digest FROM 1 FOR 16) ORDER BY chunk_id DESC))[1]
    FROM chunks c WHERE bank_id = %(bank)s AND {_UNLED} GROUP BY bank_id, key
    ON CONFLICT (bank_id, key) DO UPDATE SET chunk_id = excluded.chunk_id, digest = excluded.digest, gone = NULL
"""
_WRONG_EXPIRY = """
    ((c.ttl = 0) <> (c.expires IS NULL) OR (c.ttl > 0 AND NOT c.renew AND c.expires <> c.created + c.ttl))
"""
_EXPIRE = f"""
    UPDATE chunks c SET expires = CASE
        WHEN c.ttl = 0 THEN NULL
        WHEN c.renew THEN greatest(c.created, (
            SELECT u.last FROM chunk_use u WHERE u.chunk_id = c.chunk_id)) + c.ttl
        ELSE c.created + c.ttl END
    WHERE c.bank_id = %(bank)s AND {_WRONG_EXPIRY}
"""
_UNCOUNTED = "NOT EXISTS (SELECT 1 FROM chunk_use u WHERE u.chunk_id = c.chunk_id)"
_COUNT = f"""
    INSERT INTO chunk_use (chunk_id, bank_id)
    SELECT chunk_id, bank_id FROM chunks c WHERE bank_id = %(bank)s AND {_UNCOUNTED}
"""
_LARGEST = """
    SELECT greatest((SELECT max(chunk_id) FROM chunk_use), (SELECT max(chunk_id) FROM keys),
        (SELECT max(chunk_id) FROM chunks), (SELECT max(chunk_id) FROM quarantine)) AS largest
"""
# Those in use that count as free.
_USED = f"""
    FROM ({_LARGEST}) l, (
        SELECT last_value + CASE WHEN is_called THEN {BLOCK} ELSE 0 END AS next FROM chunk_ids
    ) s WHERE largest >= next
"""
_IDS = f"SELECT NULL, NULL, NULL, NULL, largest, next {_USED}"
# Blocks begin at 1, 1 + BLOCK and so on.
_RESERVE = f"SELECT setval('chunk_ids', (largest / {BLOCK} + 1) * {BLOCK} + 1, false) {_USED}"
_NAMED_TENANTS = f"""
    SELECT tenant, created FROM banks UNION ALL SELECT tenant, created FROM sessions
    UNION ALL SELECT '{DEFAULT_TENANT}', 0
"""
_TENANTS = f"""
    SELECT NULL, NULL, NULL, NULL, tenant FROM ({_NAMED_TENANTS}) t
    WHERE NOT EXISTS (SELECT 1 FROM tenants WHERE tenants.name = t.tenant) GROUP BY tenant
"""
_RESTORE_TENANTS = f"""
    INSERT INTO tenants (name, quota, created) SELECT tenant, '{{}}', min(created) FROM ({_NAMED_TENANTS}) t
    GROUP BY tenant ON CONFLICT DO NOTHING
"""
# Tables whose rows may belong to nothing: the condition, and what they belong to.
_ORPHANS: Mapping[str, tuple[str, str]] = {
    "chunks": (f"NOT {_KNOWN}", "bank"),
    "chunk_use": (f"NOT EXISTS ({_CHUNK})", "chunk"),
    "keys": (
        f"NOT {_KNOWN} OR (t.gone IS NULL AND NOT EXISTS ({_CHUNK})"
        " AND t.bank_id NOT IN (SELECT bank_id FROM gone_banks))",
        "chunk",
    ),
    **dict.fromkeys(
        ("evictions", "eviction_plans", "eviction_reserves", "changes", "quarantine"), (f"NOT {_KNOWN}", "bank")
    ),
    "api_keys": ("NOT EXISTS (SELECT 1 FROM tenants WHERE tenants.name = t.tenant)", "tenant"),
    "windows": ("NOT EXISTS (SELECT 1 FROM sessions s WHERE s.session_id = t.session_id)", "session"),
}
# Without any key the loopback would be open to all again, so that those of no tenant stay, and are good for nothing.
_DISOWN = f"""
    UPDATE api_keys t SET tenant = '{DEFAULT_TENANT}', banks = '["*"]',
        revoked = least(coalesce(revoked, created), created) WHERE {_ORPHANS["api_keys"][0]}
"""


def _free_ids(largest: int, first: int) -> str:
    return f"ids up to {largest} are in use, but those from {first} on count as free"


def _turns(session: str, said: int, found: int) -> str:
    return f"session {session}: the bytes of its turns are counted as {said} instead of {found}"


def _orphans(table: str) -> Question:
    condition, owner = _ORPHANS[table]
    found = f"SELECT NULL, NULL, NULL, NULL, count(*) FROM {table} t WHERE {condition} HAVING count(*) > 0"
    mend = _DISOWN if table == "api_keys" else f"DELETE FROM {table} t WHERE {condition}"
    return Question("orphan_row", found, lambda count: f"{count} rows of {table} belong to no {owner}", (mend,))


# Keys are mended before damaged rows go, whose keys are spent then.
OF_ROWS = (
    Question(
        "key_missing",
        f"{_CHUNKS} WHERE {_UNLED} AND NOT {_SPENT}",
        _said("its key leads to no chunk"),
        (_RESTORE_KEYS,),
    ),
    Question(
        "key", f"{_CHUNKS} WHERE {_SPENT}", _said("its key is also that of a chunk which is gone"), (_RESTORE_KEYS,)
    ),
    Question("tenant", _TENANTS, lambda name: f"the tenant {name} has no record, and so no quota", (_RESTORE_TENANTS,)),
    *map(_orphans, _ORPHANS),
)
# Figures are mended after that.
OF_FIGURES = (
    Question(
        "expiry",
        f"{_CHUNKS} WHERE {_WRONG_EXPIRY}",
        _said("its time of expiry does not fit its ttl"),
        (_EXPIRE,),
    ),
    Question("id", _IDS, _free_ids, (_RESERVE,)),
    Question("usage", f"{_CHUNKS} WHERE {_UNCOUNTED}", _said("it has no count of its retrievals"), (_COUNT,)),
    Question("usage", _USAGE, usage_said, (_RECOUNT, _WRITTEN)),
    Question(
        "usage",
        f"SELECT NULL, NULL, NULL, NULL, t.session_id, t.bytes, h.bytes FROM {_TURNS}",
        _turns,
        (_LOCK_BRANCHES, _RECOUNT_TURNS),
    ),
)


def ask(connection: Connection, question: Question) -> Iterator[tuple[int | None, Problem]]:
    """Yield the ids of the banks that a question finds, None for what is of no bank, with the problems."""
    for tenant, name, bank_id, chunk_id, *values in raw(connection).execute(question.found).fetchall():
        title = bank_title(tenant, name) if name is not None else ""
        yield bank_id, Problem(question.kind, question.say(*values), title, chunk_id)


def check(connection: Connection, findings: Findings) -> None:
    """Ask all questions of a moment, and add what is wrong to the findings."""
    for question in (*OF_ROWS, *OF_FIGURES):
        findings.problems += [problem for _, problem in ask(connection, question)]
    for name in broken_quotas(connection):
        findings.add("tenant", quota_said(name))


def broken_quotas(connection: Connection) -> dict[str, str]:
    """Return the quotas that cannot be read, by the names of their tenants."""
    found = raw(connection).execute("SELECT name, quota FROM tenants ORDER BY name").fetchall()
    return {name: quota for name, quota in found if not _is_json(quota)}


def quota_said(tenant: str) -> str:
    """Say that the quota of a tenant cannot be read."""
    return f"the quota of the tenant {tenant} cannot be read"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
