"""The records against themselves: sound pages, usage against sums, keys, expiry, ids, rows that belong to nothing.

Each question is one statement, and so of one moment.
"""

from sqlalchemy import Connection
from sqlalchemy.exc import DatabaseError

from memory_service.care import entries
from memory_service.care.folder import Folder
from memory_service.care.report import Findings

_USAGE = """
    SELECT name, b.chunks, b.tokens, b.bytes, count(chunk_id) AS chunks_found,
        coalesce(sum(stored_length), 0) AS tokens_found, coalesce(sum(size), 0) AS bytes_found,
        chunks_written - chunks_evicted - chunks_deleted - chunks_quarantined - chunks_expired AS chunks_counted
    FROM banks b LEFT JOIN chunks c USING (bank_id) GROUP BY bank_id
"""
WRONG_EXPIRY = """
    ((chunks.ttl = 0) != (chunks.expires IS NULL)
        OR (chunks.ttl > 0 AND NOT chunks.renew AND chunks.expires != chunks.created + chunks.ttl))
"""
_EXPIRY = f"SELECT name, chunk_id FROM chunks JOIN banks USING (bank_id) WHERE {WRONG_EXPIRY}"
_KEYS = """
    SELECT name, c.chunk_id FROM chunks c JOIN spent_keys s USING (bank_id, key) JOIN banks USING (bank_id)
"""
# A repeated write of such a chunk would not be known for one. A deleted bank loses its keys bit by bit.
_MISSING_KEY = """
    bank_id IN (SELECT bank_id FROM banks) AND NOT EXISTS (
        SELECT 1 FROM keys JOIN chunks AS named USING (chunk_id)
        WHERE keys.bank_id = chunks.bank_id AND keys.key = chunks.key)
"""
_MISSING_KEYS = f"SELECT name, chunk_id FROM chunks JOIN banks USING (bank_id) WHERE {_MISSING_KEY}"
RESTORE_KEYS = f"INSERT OR REPLACE INTO keys SELECT bank_id, key, chunk_id FROM chunks WHERE {_MISSING_KEY}"
FREE_KEYS = """
    DELETE FROM spent_keys WHERE EXISTS (
        SELECT 1 FROM keys JOIN chunks USING (chunk_id)
        WHERE keys.bank_id = spent_keys.bank_id AND keys.key = spent_keys.key)
"""
# Rows of chunks without a bank; a bank in gone_banks is being deleted, with all that it holds.
_KNOWN = "(SELECT bank_id FROM banks UNION SELECT bank_id FROM gone_banks)"
ORPHANS = {
    "chunks": f"bank_id NOT IN {_KNOWN}",
    "contents": "chunk_id NOT IN (SELECT chunk_id FROM chunks)",
    "keys": "chunk_id NOT IN (SELECT chunk_id FROM chunks UNION SELECT chunk_id FROM spent_keys)",
    "spent_keys": f"bank_id NOT IN {_KNOWN}",
    "evictions": f"bank_id NOT IN {_KNOWN}",
    "eviction_plans": f"bank_id NOT IN {_KNOWN}",
}
_LARGEST_ID = """
    SELECT max(coalesce((SELECT max(chunk_id) FROM chunks), 0), coalesce((SELECT max(chunk_id) FROM spent_keys), 0))
"""
RESERVE = f"UPDATE store SET next_chunk_id = ({_LARGEST_ID}) + 1"
_STORE = "SELECT store_id, next_chunk_id FROM store"


def check(folder: Folder, findings: Findings, *, fast: bool) -> None:
    """Add what is wrong. `fast`: look at every page, but not at the order of every index."""
    if not check_database(folder, findings, fast=fast):
        return
    found = entries.banks(folder)
    findings.totals.update(banks=len(found), chunks=sum(bank.chunks for bank in found))
    for bank in found:
        if bank.dimension is None:
            findings.add("bank", "what it is cannot be read", bank=bank.name)
    with folder.read() as connection:
        _check_usage(connection, findings)
    with folder.read() as connection:
        for name, chunk_id in connection.exec_driver_sql(_KEYS):
            findings.add("key", "its key is also that of a chunk which is gone", bank=name, chunk_id=chunk_id)
    with folder.read() as connection:
        for name, chunk_id in connection.exec_driver_sql(_MISSING_KEYS):
            findings.add("key_missing", "its key leads to no chunk", bank=name, chunk_id=chunk_id)
    with folder.read() as connection:
        for name, chunk_id in connection.exec_driver_sql(_EXPIRY):
            findings.add("expiry", "its time of expiry does not fit its ttl", bank=name, chunk_id=chunk_id)
    with folder.read() as connection:
        _check_ids(connection, findings)
    for table, condition in ORPHANS.items():
        with folder.read() as connection:
            count = connection.exec_driver_sql(f"SELECT count(*) FROM {table} WHERE {condition}").scalar_one()
        if count:
            findings.add("orphan_row", f"{count} rows of {table} belong to no {_owner(table)}")


def check_database(folder: Folder, findings: Findings, *, fast: bool) -> bool:
    """Whether SQLite finds the database sound; what it finds is added, at most 20 lines."""
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


def _check_usage(connection: Connection, findings: Findings) -> None:
    for row in connection.exec_driver_sql(_USAGE):
        wrong = [
            f"{unit} {getattr(row, unit)} instead of {getattr(row, unit + '_found')}"
            for unit in ("chunks", "tokens", "bytes")
            if getattr(row, unit) != getattr(row, unit + "_found")
        ]
        if row.chunks_counted != row.chunks_found:
            wrong.append(f"written less gone is {row.chunks_counted} instead of {row.chunks_found}")
        if wrong:
            findings.add("usage", f"its usage is counted wrongly: {', '.join(wrong)}", bank=row.name)


def _check_ids(connection: Connection, findings: Findings) -> None:
    stores = connection.exec_driver_sql(_STORE).all()
    if len(stores) != 1 or not stores[0].store_id:
        findings.add("database", f"the folder has {len(stores)} identities instead of one")
        return
    largest = connection.exec_driver_sql(_LARGEST_ID).scalar_one()
    if largest >= stores[0].next_chunk_id:
        findings.add("id", f"ids up to {largest} are in use, but those from {stores[0].next_chunk_id} on count as free")


def _owner(table: str) -> str:
    return "chunk" if table == "contents" else "bank"
