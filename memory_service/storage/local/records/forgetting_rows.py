"""The rows of what was forgotten; implements `memory_service.storage.forgetting.rows.ReceiptRows`. A function that
changes rows runs in a transaction of the writer, one that only reads also in that of a reader."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from memory_service.domain.forgetting import Receipt
from memory_service.storage.forgetting.receipt_row import KEPT_US, Pending, counts_of, of_tenant, receipt_of
from memory_service.storage.local.records.schema import raw


def insert(connection: Connection, tenant: str, subject: str, receipt: Receipt, work: Mapping[str, Any]) -> Pending:
    """Write down what is to be forgotten, and drop what was kept long enough. subject: names what was asked for. work:
    its `ids` are those of chunks; see `ids_of`."""
    old = receipt.time - KEPT_US
    driver = raw(connection)
    driver.execute("DELETE FROM forgettings WHERE time <= ? AND work IS NULL", (old,))
    driver.execute("DELETE FROM gone_branches WHERE gone <= ?", (old,))
    said = (receipt.receipt_id, tenant, subject, receipt.key_id, receipt.target, receipt.time)
    if "ids" in work:
        ids = (receipt.receipt_id, tenant, json.dumps(work["ids"]))
        driver.execute("INSERT INTO forgetting_ids VALUES (?, ?, ?)", ids)
    rest = {name: value for name, value in work.items() if name != "ids"}
    row = (*said, counts_of(receipt), json.dumps(rest))
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
    return receipt_of(*raw(connection).execute(statement, (receipt_id,)).fetchone())


def save(connection: Connection, receipt: Receipt) -> None:
    """Replace what a receipt counts."""
    values = (counts_of(receipt), receipt.receipt_id)
    raw(connection).execute("UPDATE forgettings SET counts = ? WHERE receipt_id = ?", values)


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
