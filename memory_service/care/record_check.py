"""The check of the records against themselves: sound pages, usage against sums, keys, expiry, ids, rows that belong to
nothing. This file owns that each question is one statement, and so is answered for one moment.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy.exc import DatabaseError

from memory_service.care import entries, session_check
from memory_service.care.folder import Folder
from memory_service.care.report import Findings, Kind
from memory_service.domain.tenants import DEFAULT_TENANT, bank_title

_USAGE = """
    SELECT tenant, name, b.chunks, b.tokens, b.bytes, count(chunk_id) AS chunks_found,
        coalesce(sum(stored_length), 0) AS tokens_found, coalesce(sum(size), 0) AS bytes_found,
        chunks_written - chunks_evicted - chunks_deleted - chunks_quarantined - chunks_expired AS chunks_counted
    FROM banks b LEFT JOIN chunks c USING (bank_id) GROUP BY bank_id
"""
WRONG_EXPIRY = """
    ((chunks.ttl = 0) != (chunks.expires IS NULL)
        OR (chunks.ttl > 0 AND NOT chunks.renew AND chunks.expires != chunks.created + chunks.ttl))
"""
_EXPIRY = f"SELECT tenant, name, chunk_id FROM chunks JOIN banks USING (bank_id) WHERE {WRONG_EXPIRY}"
_KEYS = """
    SELECT tenant, name, c.chunk_id FROM chunks c JOIN spent_keys s USING (bank_id, key) JOIN banks USING (bank_id)
"""
# A repeated write of such a chunk would not be known for one. A deleted bank loses its keys bit by bit.
_MISSING_KEY = """
    bank_id IN (SELECT bank_id FROM banks) AND NOT EXISTS (
        SELECT 1 FROM keys JOIN chunks AS named USING (chunk_id)
        WHERE keys.bank_id = chunks.bank_id AND keys.key = chunks.key)
"""
_MISSING_KEYS = f"SELECT tenant, name, chunk_id FROM chunks JOIN banks USING (bank_id) WHERE {_MISSING_KEY}"
RESTORE_KEYS = f"INSERT OR REPLACE INTO keys SELECT bank_id, key, chunk_id FROM chunks WHERE {_MISSING_KEY}"
FREE_KEYS = """
    DELETE FROM spent_keys WHERE EXISTS (
        SELECT 1 FROM keys JOIN chunks USING (chunk_id)
        WHERE keys.bank_id = spent_keys.bank_id AND keys.key = spent_keys.key)
"""
# The banks whose rows belong to something; one in gone_banks is being deleted, with all that it holds.
_KNOWN = "(SELECT bank_id FROM banks UNION SELECT bank_id FROM gone_banks)"
ORPHANS = {
    "chunks": f"bank_id NOT IN {_KNOWN}",
    "contents": "chunk_id NOT IN (SELECT chunk_id FROM chunks)",
    "unsynced": "chunk_id NOT IN (SELECT chunk_id FROM chunks)",
    "keys": "chunk_id NOT IN (SELECT chunk_id FROM chunks UNION SELECT chunk_id FROM spent_keys)",
    "spent_keys": f"bank_id NOT IN {_KNOWN}",
    "evictions": f"bank_id NOT IN {_KNOWN}",
    "eviction_plans": f"bank_id NOT IN {_KNOWN}",
    "api_keys": "tenant NOT IN (SELECT name FROM tenants)",
    "windows": "session_id NOT IN (SELECT session_id FROM sessions)",
}
# Without any key the loopback would be open to all again, so that those of no tenant stay, and are good for nothing.
DISOWN_KEYS = f"""
    UPDATE api_keys
    SET tenant = '{DEFAULT_TENANT}', banks = '["*"]', revoked = min(coalesce(revoked, created), created)
    WHERE {ORPHANS["api_keys"]}
"""
# Banks can be read without the record of their tenant, and no bank can be made.
_TENANTS = f"""
    SELECT tenant, min(created) AS created FROM banks GROUP BY tenant
    UNION SELECT tenant, min(created) FROM sessions GROUP BY tenant UNION SELECT '{DEFAULT_TENANT}', 0
"""
_MISSING_TENANTS = f"SELECT DISTINCT tenant FROM ({_TENANTS}) WHERE tenant NOT IN (SELECT name FROM tenants)"
RESTORE_TENANTS = f"""
    INSERT OR IGNORE INTO tenants (name, quota, created)
    SELECT tenant, '{{}}', max(created) FROM ({_TENANTS}) GROUP BY tenant
"""
_TURNS = """
    SELECT branch, session_id, bytes, (
        SELECT coalesce(sum(size), 0) FROM turns WHERE turns.branch = branches.branch) AS bytes_found
    FROM branches WHERE bytes != bytes_found
"""
_BROKEN_QUOTAS = "SELECT name AS tenant FROM tenants WHERE NOT json_valid(quota)"
RESTORE_QUOTAS = "UPDATE tenants SET quota = '{}' WHERE NOT json_valid(quota)"
_LARGEST_ID = """
    SELECT max(coalesce((SELECT max(chunk_id) FROM chunks), 0), coalesce((SELECT max(chunk_id) FROM spent_keys), 0))
"""
RESERVE = f"UPDATE store SET next_chunk_id = ({_LARGEST_ID}) + 1"
_IDENTITIES = "SELECT count(*) AS found, coalesce(sum(store_id != ''), 0) AS named FROM store"
_USED_IDS = f"""
    SELECT next_chunk_id, ({_LARGEST_ID}) AS largest FROM store
    WHERE largest >= next_chunk_id AND store_id != '' AND (SELECT count(*) FROM store) = 1
"""


class Question(NamedTuple):
    """A question about the records: a statement whose rows may each be a problem of this kind. `say` makes a sentence
    of a row, or "" where nothing is wrong; the row may have the `tenant` and `name` of a bank, and a `chunk_id`."""

    kind: Kind
    statement: str
    say: Callable[[Any], str]


def _usage(row: Any) -> str:
    found = (row.chunks_found, row.tokens_found, row.bytes_found)
    return usage_said(row.chunks, row.tokens, row.bytes, *found, row.chunks_counted)


def usage_said(*figures: int) -> str:
    """Say what is wrong with the usage of a bank; "" for nothing. figures: its chunks, tokens and bytes as its row says
    them, then as its chunks do, and the chunks that were written less those that have gone."""
    *kept, counted = figures
    wrong = [
        f"{unit} {said} instead of {found}"
        for unit, said, found in zip(("chunks", "tokens", "bytes"), kept[:3], kept[3:], strict=True)
        if said != found
    ]
    if counted != kept[3]:
        wrong.append(f"written less gone is {counted} instead of {kept[3]}")
    return f"its usage is counted wrongly: {', '.join(wrong)}" if wrong else ""


def _identity(row: Any) -> str:
    return "" if row.found == row.named == 1 else f"the folder has {row.found} identities instead of one"


def _free_ids(row: Any) -> str:
    return f"ids up to {row.largest} are in use, but those from {row.next_chunk_id} on count as free"


def _orphans(table: str, row: Any) -> str:
    owner = {"contents": "chunk", "unsynced": "chunk", "api_keys": "tenant", "windows": "session"}.get(table, "bank")
    return f"{row.found} rows of {table} belong to no {owner}" if row.found else ""


def _turns(row: Any) -> str:
    return f"session {row.session_id}: the bytes of its turns are counted as {row.bytes} instead of {row.bytes_found}"


# They are asked in this order, each in a read transaction of its own.
_QUESTIONS = (
    Question("usage", _USAGE, _usage),
    Question("usage", _TURNS, _turns),
    Question("key", _KEYS, lambda _: "its key is also that of a chunk which is gone"),
    Question("key_missing", _MISSING_KEYS, lambda _: "its key leads to no chunk"),
    Question("expiry", _EXPIRY, lambda _: "its time of expiry does not fit its ttl"),
    Question("tenant", _MISSING_TENANTS, lambda row: f"the tenant {row.tenant} has no record, and so no quota"),
    Question("tenant", _BROKEN_QUOTAS, lambda row: f"the quota of the tenant {row.tenant} cannot be read"),
    Question("database", _IDENTITIES, _identity),
    Question("id", _USED_IDS, _free_ids),
    *(
        Question("orphan_row", f"SELECT count(*) AS found FROM {table} WHERE {condition}", partial(_orphans, table))
        for table, condition in ORPHANS.items()
    ),
)


def check(folder: Folder, findings: Findings, *, fast: bool) -> None:
    """Add to the findings what is wrong with the records. fast: whether to look at every page of the database, but not
    at the order of every index."""
    if not check_database(folder, findings, fast=fast):
        return
    found = entries.banks(folder)
    findings.totals.update(banks=len(found), chunks=sum(bank.chunks for bank in found))
    for bank in found:
        if bank.dimension is None:
            findings.add("bank", "what it is cannot be read", bank=bank.title)
    for question in _QUESTIONS:
        with folder.read() as connection:
            for row in connection.exec_driver_sql(question.statement):
                if text := question.say(row):
                    of = row._mapping
                    title = bank_title(of["tenant"], of["name"]) if "name" in of else ""
                    findings.add(question.kind, text, bank=title, chunk_id=of.get("chunk_id"))
    session_check.check(folder, findings, fast=fast)


def check_database(folder: Folder, findings: Findings, *, fast: bool) -> bool:
    """Ask SQLite whether the database is sound, and return that; what it finds is added to the findings, at most 20
    lines."""
    pragma = "quick_check" if fast else "integrity_check"
    try:
        with folder.read() as connection:
            lines = list(connection.exec_driver_sql(f"PRAGMA {pragma}(20)").scalars())
    except DatabaseError as error:
        lines = [str(error.orig)]
    if lines == ["ok"]:
        return True
    for line in lines:
        findings.add("database", " ".join(str(line).split()))
    return False
