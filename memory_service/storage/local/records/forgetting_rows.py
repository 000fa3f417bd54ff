"""The rows of what was forgotten. A function that changes them runs in a transaction of the writer, one that only reads
also in that of a reader.

This file owns that what is being forgotten is written down before anything of it goes, in ids and numbers alone, and
that the row is done only when all is gone: so a start finds what a kill has interrupted.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from sqlalchemy import Connection

from memory_service.domain.forgetting import ForgottenChunk, Receipt
from memory_service.storage.local.records.schema import raw

# Microseconds for which receipts are kept, and branches of sessions that were forgotten are known.
_KEPT_US = 30 * 86_400 * 1_000_000
_COUNTED = ("chunks", "turns", "tokens", "bytes", "places", "turns_kept", "chunks_to_make_again")


class Pending(NamedTuple):
    """A forgetting that is not done. subject: names what was asked for. work: what is to be done, of ids and numbers,
    without the ids of chunks; its `kind` says how it is read."""

    receipt_id: str
    tenant: str
    subject: str
    work: Mapping[str, Any]


def insert(connection: Connection, tenant: str, subject: str, receipt: Receipt, work: Mapping[str, Any]) -> Pending:
    """Write down what is to be forgotten, and drop what was kept long enough. subject: names what was asked for. work:
    its `ids` are those of chunks; see `ids_of`."""
    old = receipt.time - _KEPT_US
    driver = raw(connection)
    driver.execute("DELETE FROM forgettings WHERE time <= ? AND work IS NULL", (old,))
    driver.execute("DELETE FROM gone_branches WHERE gone <= ?", (old,))
    said = (receipt.receipt_id, tenant, subject, receipt.key_id, receipt.target, receipt.time)
    if "ids" in work:
        ids = (receipt.receipt_id, tenant, json.dumps(work["ids"]))
        driver.execute("INSERT INTO forgetting_ids VALUES (?, ?, ?)", ids)
    rest = {name: value for name, value in work.items() if name != "ids"}
    row = (*said, _counts(receipt), json.dumps(rest))
    driver.execute("INSERT INTO forgettings VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    return Pending(receipt.receipt_id, tenant, subject, rest)


def ids_of(connection: Connection, receipt_id: str) -> list[int]:
    """Return the ids of the chunks that are to be forgotten."""
    statement = "SELECT ids FROM forgetting_ids WHERE receipt_id = ?"
    found: list[int] = json.loads(raw(connection).execute(statement, (receipt_id,)).fetchone()[0])
    return found


def get(connection: Connection, receipt_id: str) -> Receipt:
    """Read the receipt of an id."""
    statement = "SELECT receipt_id, time, key_id, target, counts FROM forgettings WHERE receipt_id = ?"
    receipt, time, key_id, target, counts = raw(connection).execute(statement, (receipt_id,)).fetchone()
    found = json.loads(counts)
    chunks = tuple(ForgottenChunk(*each) for each in found.pop("chunks"))
    return Receipt(receipt, time, key_id, target, chunks, **found)


def add(connection: Connection, receipt_id: str, **went: Any) -> None:
    """Count more that went; see `Receipt.plus`."""
    counts = _counts(get(connection, receipt_id).plus(**went))
    raw(connection).execute("UPDATE forgettings SET counts = ? WHERE receipt_id = ?", (counts, receipt_id))


def done(connection: Connection, receipt_id: str) -> None:
    """Note that all is gone."""
    raw(connection).execute("UPDATE forgettings SET work = NULL WHERE receipt_id = ?", (receipt_id,))
    raw(connection).execute("DELETE FROM forgetting_ids WHERE receipt_id = ?", (receipt_id,))


def drop(connection: Connection, receipt_id: str) -> None:
    """Drop the receipt of an id."""
    raw(connection).execute("DELETE FROM forgettings WHERE receipt_id = ?", (receipt_id,))


def earlier(connection: Connection, tenant: str, subject: str, but: str = "") -> Receipt | None:
    """Return the newest receipt of what was asked for before; None where it was not. but: the id of one that does not
    count."""
    statement = """
        SELECT receipt_id FROM forgettings WHERE tenant = ? AND subject = ? AND receipt_id != ? AND work IS NULL
        ORDER BY time DESC LIMIT 1
    """
    row = raw(connection).execute(statement, (tenant, subject, but)).fetchone()
    return None if row is None else get(connection, row[0])


def of_tenant(name: str) -> str:
    """Return the subject of the forgetting of a tenant."""
    return f"tenant {name}"


def is_tenant_going(connection: Connection, name: str) -> bool:
    """Tell whether a tenant is being forgotten."""
    statement = "SELECT 1 FROM forgettings WHERE subject = ? AND work IS NOT NULL"
    return raw(connection).execute(statement, (of_tenant(name),)).fetchone() is not None


def pending(connection: Connection) -> list[Pending]:
    """Return what is not done, oldest first."""
    statement = "SELECT receipt_id, tenant, subject, work FROM forgettings WHERE work IS NOT NULL ORDER BY time"
    rows = raw(connection).execute(statement)
    return [Pending(receipt, tenant, subject, json.loads(work)) for receipt, tenant, subject, work in rows]


def branches_going(connection: Connection) -> set[str]:
    """Return the branches whose session is gone and whose turns are going: their names, and "of " and the name of a
    tenant for all of the tenant's."""
    works = [each.work for each in pending(connection)]
    names = {left[0] for work in works if work["kind"] == "session" for left in work["left"]}
    return names | {f"of {work['name']}" for work in works if work["kind"] == "tenant"}


def _counts(receipt: Receipt) -> str:
    said = asdict(receipt)
    chunks = [(each.bank, each.chunk_id, each.checksum) for each in receipt.chunks]
    return json.dumps({name: said[name] for name in _COUNTED} | {"chunks": chunks})
