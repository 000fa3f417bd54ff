"""The rows of banks. A function that changes them runs in a transaction of the writer, one that only reads also in that
of a reader."""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from memory_service.domain.model import Bank, Capacity, EmbeddingSpec, Expiry, KvSpec, Policy, Quota, Usage
from memory_service.storage.local.records.schema import BankRow, EvictionPlanRow, GoneBankRow, raw

_USAGE = [BankRow.__table__.c[name.name] for name in fields(Usage)]


def insert(connection: Connection, bank: Bank) -> int:
    """Insert a bank, and return its bank_id. The caller has checked that the name is free."""
    identity = {"uid": bank.uid, "tenant": bank.tenant, "name": bank.name, "created": bank.created}
    values = _bank_values(bank) | identity | asdict(Usage())
    return int(connection.execute(sa.insert(BankRow).values(values).returning(BankRow.bank_id)).scalar_one())


def update(connection: Connection, bank: Bank) -> None:
    """Write what may change: name, capacity, policy, metadata, quota, expiry and index. The caller has checked that the
    name is free, or the bank's own."""
    values = _bank_values(bank) | {"name": bank.name}
    connection.execute(sa.update(BankRow).where(BankRow.bank_id == bank.bank_id).values(values))


def delete(connection: Connection, bank_id: int) -> bool:
    """Delete a bank, and return whether it existed; `gone_rows.clear_bank` removes what it holds."""
    uid = connection.scalar(sa.delete(BankRow).where(BankRow.bank_id == bank_id).returning(BankRow.uid))
    if uid is None:
        return False
    connection.execute(sa.insert(GoneBankRow).values(bank_id=bank_id, uid=uid))
    connection.execute(sa.delete(EvictionPlanRow).where(EvictionPlanRow.bank_id == bank_id))
    return True


def gone(connection: Connection) -> list[tuple[int, str]]:
    """Return id and uid of the deleted banks of which something is left."""
    return [(row.bank_id, row.uid) for row in connection.execute(sa.select(GoneBankRow.bank_id, GoneBankRow.uid))]


def of_all(connection: Connection, tenant: str = "", name: str = "") -> Iterator[Bank]:
    """Read the banks of all tenants one after the other, by tenant and name, from the first one after these."""
    place = sa.tuple_(BankRow.tenant, BankRow.name)
    later = sa.select(BankRow.__table__).where(place > sa.tuple_(sa.literal(tenant), sa.literal(name)))
    yield from map(_bank, connection.execute(later.order_by(BankRow.tenant, BankRow.name)))


def after(connection: Connection, tenant: str, name: str = "") -> Iterator[Bank]:
    """Read the banks of a tenant one after the other, by name, from the first one after `name`."""
    later = sa.select(BankRow.__table__).where(BankRow.tenant == tenant, BankRow.name > name)
    yield from map(_bank, connection.execute(later.order_by(BankRow.name)))


def get(connection: Connection, bank_id: int) -> Bank | None:
    """Read a bank by its id, with its usage now."""
    row = connection.execute(sa.select(BankRow.__table__).where(BankRow.bank_id == bank_id)).one_or_none()
    return None if row is None else _bank(row)


def named(connection: Connection, tenant: str, name: str) -> Bank | None:
    """Read a bank of a tenant by its name, with its usage now."""
    found = sa.select(BankRow.__table__).where(BankRow.tenant == tenant, BankRow.name == name)
    row = connection.execute(found).one_or_none()
    return None if row is None else _bank(row)


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


def _bank_values(bank: Bank) -> dict[str, Any]:
    kv = asdict(bank.kv) | {"reader_parts": dict(bank.kv.reader_parts)}
    if not bank.kv.hidden_size:
        del kv["hidden_size"]  # as in what was written before there was one
    return {
        "spec": json.dumps({"kv": kv, "embedding": asdict(bank.embedding)}),
        "capacity": None if bank.capacity is None else json.dumps(asdict(bank.capacity)),
        "policy": json.dumps(asdict(bank.policy)),
        "quota": json.dumps(asdict(bank.quota)),
        "expiry": json.dumps(asdict(bank.expiry)),
        "index_kind": bank.index,
        "meta": json.dumps(dict(bank.metadata)),
    }


def _bank(row: Row[Any]) -> Bank:
    spec = json.loads(row.spec)
    kv = spec["kv"]
    return Bank(
        name=row.name,
        kv=KvSpec(**(kv | {"layers": tuple(kv["layers"])})),
        embedding=EmbeddingSpec(**spec["embedding"]),
        capacity=None if row.capacity is None else Capacity(**json.loads(row.capacity)),
        policy=Policy(**json.loads(row.policy)),
        metadata=json.loads(row.meta),
        bank_id=row.bank_id,
        uid=row.uid,
        created=row.created,
        usage=Usage(*(getattr(row, column.name) for column in _USAGE)),
        quota=Quota(**json.loads(row.quota)),
        expiry=Expiry(**json.loads(row.expiry)),
        index=row.index_kind,
        tenant=row.tenant,
    )


# As text, and by the driver: building and looking up the same statement as an expression costs ten times its
# execution, and these run for every chunk that is written, retrieved or evicted.
_FIND_USAGE = f"SELECT {', '.join(column.name for column in _USAGE)} FROM banks WHERE bank_id = ?"
