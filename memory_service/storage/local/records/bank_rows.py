"""The rows of banks. A function that changes them runs in a transaction of the writer, one that only reads also in that
of a reader."""

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import Connection

from memory_service.domain.model import Bank, Usage
from memory_service.storage.banks.bank_json import bank_of, values_of
from memory_service.storage.local.records.schema import raw
from memory_service.storage.local.records.tables import BANKS, EVICTION_PLANS, GONE_BANKS

_COLUMNS = [column.name for column in BANKS.columns]
_USAGE = [BANKS.c[name.name] for name in fields(Usage)]
# Rows of `_FIND`, without the price of SQLAlchemy's.
_found_row = cast(Any, namedtuple("_Found", _COLUMNS))._make


def insert(connection: Connection, bank: Bank) -> int:
    """Insert a bank, and return its bank_id. The caller has checked that the name is free."""
    identity = {"uid": bank.uid, "tenant": bank.tenant, "name": bank.name, "created": bank.created}
    values = values_of(bank) | identity | asdict(Usage())
    return int(connection.execute(sa.insert(BANKS).values(values).returning(BANKS.c.bank_id)).scalar_one())


def update(connection: Connection, bank: Bank) -> None:
    """Write what may change: name, capacity, policy, metadata, quota, expiry and index. The caller has checked that the
    name is free, or the bank's own."""
    values = values_of(bank) | {"name": bank.name}
    connection.execute(sa.update(BANKS).where(BANKS.c.bank_id == bank.bank_id).values(values))


def delete(connection: Connection, bank_id: int) -> bool:
    """Delete a bank, and return whether it existed; `gone_rows.clear_bank` removes what it holds."""
    uid = connection.scalar(sa.delete(BANKS).where(BANKS.c.bank_id == bank_id).returning(BANKS.c.uid))
    if uid is None:
        return False
    connection.execute(sa.insert(GONE_BANKS).values(bank_id=bank_id, uid=uid))
    connection.execute(sa.delete(EVICTION_PLANS).where(EVICTION_PLANS.c.bank_id == bank_id))
    return True


def gone(connection: Connection) -> list[tuple[int, str]]:
    """Return id and uid of the deleted banks of which something is left."""
    return [(row.bank_id, row.uid) for row in connection.execute(sa.select(GONE_BANKS.c.bank_id, GONE_BANKS.c.uid))]


def of_all(connection: Connection, tenant: str = "", name: str = "") -> Iterator[Bank]:
    """Read the banks of all tenants one after the other, by tenant and name, from the first one after these."""
    place = sa.tuple_(BANKS.c.tenant, BANKS.c.name)
    later = sa.select(BANKS).where(place > sa.tuple_(sa.literal(tenant), sa.literal(name)))
    yield from map(bank_of, connection.execute(later.order_by(BANKS.c.tenant, BANKS.c.name)))


def after(connection: Connection, tenant: str, name: str = "") -> Iterator[Bank]:
    """Read the banks of a tenant one after the other, by name, from the first one after `name`."""
    later = sa.select(BANKS).where(BANKS.c.tenant == tenant, BANKS.c.name > name)
    yield from map(bank_of, connection.execute(later.order_by(BANKS.c.name)))


def get(connection: Connection, bank_id: int) -> Bank | None:
    """Read a bank by its id, with its usage now."""
    row = raw(connection).execute(_FIND, (bank_id,)).fetchone()
    return None if row is None else bank_of(_found_row(row))


def named(connection: Connection, tenant: str, name: str) -> Bank | None:
    """Read a bank of a tenant by its name, with its usage now."""
    found = sa.select(BANKS).where(BANKS.c.tenant == tenant, BANKS.c.name == name)
    row = connection.execute(found).one_or_none()
    return None if row is None else bank_of(row)


def count(connection: Connection) -> int:
    """Count the banks that are not deleted."""
    return int(raw(connection).execute("SELECT count(*) FROM banks").fetchone()[0])


def totals(connection: Connection) -> tuple[int, int, int, int]:
    """Count the banks, and their live chunks, tokens and payload bytes."""
    row = raw(connection).execute("SELECT count(*), sum(chunks), sum(tokens), sum(bytes) FROM banks").fetchone()
    return row[0], row[1] or 0, row[2] or 0, row[3] or 0


def usage(connection: Connection, bank_id: int) -> Usage | None:
    """Read the usage of a bank now; None when there is no such bank."""
    row = raw(connection).execute(_FIND_USAGE, (bank_id,)).fetchone()
    return None if row is None else Usage(*row)


# As text, and by the driver: building and looking up the same statement as an expression costs ten times its
# execution, and these run for every chunk that is written, retrieved or evicted, and whenever a bank is asked for.
_FIND_USAGE = f"SELECT {', '.join(column.name for column in _USAGE)} FROM banks WHERE bank_id = ?"
_FIND = f"SELECT {', '.join(_COLUMNS)} FROM banks WHERE bank_id = ?"
