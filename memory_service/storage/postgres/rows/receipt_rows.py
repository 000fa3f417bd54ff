"""The rows of what was forgotten; implements `memory_service.storage.forgetting.rows.ReceiptRows`."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from memory_service.domain.forgetting import Receipt
from memory_service.storage.forgetting.receipt_row import KEPT_US, Pending, counts_of, of_tenant, receipt_of
from memory_service.storage.postgres.database import raw
from memory_service.storage.postgres.rows.sought import sought

_INSERT = """
    INSERT INTO forgettings (receipt_id, tenant, subject, key_id, target, time, counts, work)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
_EARLIER = """
    SELECT receipt_id FROM forgettings WHERE tenant = %s AND subject = %s AND receipt_id != %s AND work IS NULL
    ORDER BY time DESC LIMIT 1
"""


def insert(connection: Connection, tenant: str, subject: str, receipt: Receipt, work: Mapping[str, Any]) -> Pending:
    """Write down what is to be forgotten, and drop what was kept long enough. subject: names what was asked for. work:
    its `ids` are those of chunks; see `ids_of`."""
    driver, old = raw(connection), receipt.time - KEPT_US
    driver.execute("DELETE FROM forgettings WHERE time <= %s AND work IS NULL", (old,))
    driver.execute("DELETE FROM gone_branches WHERE gone <= %s", (old,))
    if "ids" in work:
        statement = "INSERT INTO forgetting_ids (receipt_id, tenant, ids) VALUES (%s, %s, %s)"
        driver.execute(statement, (receipt.receipt_id, tenant, list(work["ids"])))
    rest = {name: value for name, value in work.items() if name != "ids"}
    said = (receipt.receipt_id, tenant, subject, receipt.key_id, receipt.target, receipt.time)
    driver.execute(_INSERT, (*said, counts_of(receipt), json.dumps(rest)))
    return Pending(receipt.receipt_id, tenant, subject, rest)


def ids_of(connection: Connection, receipt_id: str) -> list[int]:
    """Return the ids of the chunks that are to be forgotten."""
    statement = "SELECT ids FROM forgetting_ids WHERE receipt_id = %s"
    row = raw(connection).execute(statement, (receipt_id,), binary=True).fetchone()
    return [] if row is None else list(row[0])


def get(connection: Connection, receipt_id: str) -> Receipt:
    """Read the receipt of an id."""
    statement = "SELECT receipt_id, time, key_id, target, counts FROM forgettings WHERE receipt_id = %s"
    row = raw(connection).execute(statement, (receipt_id,)).fetchone()
    assert row is not None
    return receipt_of(*row)


def save(connection: Connection, receipt: Receipt) -> None:
    """Replace what a receipt counts."""
    values = (counts_of(receipt), receipt.receipt_id)
    raw(connection).execute("UPDATE forgettings SET counts = %s WHERE receipt_id = %s", values)


def done(connection: Connection, receipt_id: str) -> None:
    """Note that all is gone."""
    raw(connection).execute("UPDATE forgettings SET work = NULL WHERE receipt_id = %s", (receipt_id,))
    raw(connection).execute("DELETE FROM forgetting_ids WHERE receipt_id = %s", (receipt_id,))


def drop(connection: Connection, receipt_id: str) -> None:
    """Drop the receipt of an id."""
    raw(connection).execute("DELETE FROM forgettings WHERE receipt_id = %s", (receipt_id,))


def earlier(connection: Connection, tenant: str, subject: str, but: str = "") -> Receipt | None:
    """Return the newest receipt of what was asked for before; None where it was not. but: the id of one that does not
    count."""
    row = raw(connection).execute(_EARLIER, (tenant, sought(subject), but)).fetchone()
    return None if row is None else get(connection, row[0])


def is_tenant_going(connection: Connection, name: str) -> bool:
    """Tell whether a tenant is being forgotten."""
    statement = "SELECT 1 FROM forgettings WHERE subject = %s AND work IS NOT NULL"
    return raw(connection).execute(statement, (of_tenant(name),)).fetchone() is not None


def pending(connection: Connection) -> list[Pending]:
    """Return what is not done, oldest first."""
    statement = "SELECT receipt_id, tenant, subject, work FROM forgettings WHERE work IS NOT NULL ORDER BY time"
    rows = raw(connection).execute(statement).fetchall()
    return [Pending(receipt, tenant, subject, json.loads(work)) for receipt, tenant, subject, work in rows]
