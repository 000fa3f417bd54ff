"""The rows of banks."""

from collections import namedtuple
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from sqlalchemy import Connection

from memory_service.domain.model import Bank, Usage, bank_bytes
from memory_service.storage.banks.bank_json import USAGE, bank_of, values_of
from memory_service.storage.postgres.database import Asked, raw
from memory_service.storage.postgres.rows.sought import sought

_NAMES = (
    *("bank_id", "uid", "tenant", "name", "spec", "capacity", "policy", "meta", "quota", "expiry", "index_kind"),
    *("created", *USAGE),
)
_row = cast(Any, namedtuple("_BankRow", _NAMES))._make
_COLUMNS = ", ".join(_NAMES)
_FIND = f"SELECT {_COLUMNS} FROM banks"
# With how far its changes go, and, four numbers a chunk, when those of its chunks expire that may have expired.
_FIND_CURRENT = f"""
    SELECT {_COLUMNS}, seq, trimmed, mark, ARRAY(
        SELECT unnest(ARRAY[c.chunk_id, c.ttl, c.renew::int::int8, c.expires])
        FROM chunks c WHERE c.bank_id = banks.bank_id AND c.expires BETWEEN 0 AND %s
    ) FROM banks WHERE tenant = %s AND name = ANY(%s)
"""
# Whether a bank has its name, the transaction of a number and mark was the last one that has changed it, and no chunk
# of the bank has expired unless a retrieval has renewed it; see `unchanged_values`. This is asked of one bank, so that
# only one part of `chunks` is looked at.
UNCHANGED = """
    EXISTS (
        SELECT FROM banks WHERE bank_id = %(bank)s AND tenant = %(tenant)s AND name = %(name)s
        AND seq = %(seq)s AND mark = %(mark)s
    ) AND NOT EXISTS (SELECT FROM chunks WHERE bank_id = %(bank)s AND expires BETWEEN 0 AND %(now)s)
"""
# Banks that are read at once.
_PAGE = 256


class Head(NamedTuple):
    """How far the changes of a bank go: the number of the last transaction that has changed it, and of the last one
    that is not in `changes` any more; and the mark of the former."""

    seq: int
    trimmed: int
    mark: int


def insert(connection: Connection, bank: Bank) -> int:
    """Insert a bank, and return its bank_id. The caller has checked that the name is free."""
    values = values_of(bank) | {"uid": bank.uid, "tenant": bank.tenant, "name": bank.name, "created": bank.created}
    values["size"] = bank_bytes(bank)
    places = ", ".join(f"%({name})s" for name in values)
    statement = f"INSERT INTO banks (bank_id, {', '.join(values)}) VALUES (nextval('bank_ids'), {places})"
    found = raw(connection).execute(f"{statement} RETURNING bank_id", values, binary=True).fetchone()
    assert found is not None
    return int(found[0])


def update(connection: Connection, bank: Bank) -> None:
    """Write what may change: name, capacity, policy, metadata, quota, expiry and index. The caller has checked that the
    name is free, or the bank's own."""
    values = values_of(bank) | {"name": bank.name, "size": bank_bytes(bank)}
    changes = ", ".join(f"{name} = %({name})s" for name in values)
    raw(connection).execute(
        f"UPDATE banks SET {changes} WHERE bank_id = %(bank_id)s", {**values, "bank_id": bank.bank_id}
    )


def delete(connection: Connection, bank: Bank) -> bool:
    """Delete a bank, and return whether it existed; what it holds goes in the background."""
    driver, values = raw(connection), (bank.bank_id,)
    if driver.execute("DELETE FROM banks WHERE bank_id = %s", values).rowcount == 0:
        return False
    driver.execute("DELETE FROM eviction_plans WHERE bank_id = %s", values)
    driver.execute("DELETE FROM eviction_reserves WHERE bank_id = %s", values)
    driver.execute("INSERT INTO gone_banks VALUES (%s, %s, %s, %s)", (bank.bank_id, bank.uid, bank.tenant, bank.name))
    return True


def get(connection: Connection, bank_id: int) -> Bank | None:
    """Read a bank by its id, with its usage; None where it is not there."""
    return _one(connection, f"{_FIND} WHERE bank_id = %s", bank_id)


def named(connection: Connection, tenant: str, name: str, *, lock: bool = False) -> Bank | None:
    """Read a bank of a tenant by its name, with its usage; None where it is not there. lock: whether others that would
    change it wait for the end of this transaction."""
    return _one(
        connection, f"{_FIND} WHERE tenant = %s AND name = %s{' FOR UPDATE' * lock}", sought(tenant), sought(name)
    )


def locked(connection: Connection, bank_id: int) -> tuple[Bank, Head] | None:
    """Read a bank by its id, with its usage and how far its changes go, and let others that would change it wait
    for the end of this transaction; None where it is not there."""
    return read_locked(ask_locked(connection, bank_id))


def ask_locked(connection: Connection, bank_id: int) -> Asked:
    """Ask for a bank as `locked` does; see `read_locked`."""
    statement = f"SELECT {_COLUMNS}, seq, trimmed, mark FROM banks WHERE bank_id = %s FOR UPDATE"
    return raw(connection).execute(statement, (bank_id,), binary=True)


def read_locked(asked: Asked) -> tuple[Bank, Head] | None:
    """Return the bank that was asked for, with how far its changes go; None where it is not there."""
    row = asked.fetchone()
    return None if row is None else (bank_of(_row(row[:-3])), Head(*row[-3:]))


def _one(connection: Connection, statement: str, *values: object) -> Bank | None:
    row = raw(connection).execute(statement, values, binary=True).fetchone()
    return None if row is None else bank_of(_row(row))


def of_all(connection: Connection, tenant: str = "", name: str = "") -> Iterator[Bank]:
    """Read the banks of all tenants one after the other, by tenant and name, from the first one after these."""
    statement = f"{_FIND} WHERE (tenant, name) > (%s, %s) ORDER BY tenant, name LIMIT {_PAGE}"
    tenant, name = sought(tenant), sought(name)
    while found := raw(connection).execute(statement, (tenant, name), binary=True).fetchall():
        yield from map(bank_of, rows := [_row(row) for row in found])
        tenant, name = rows[-1].tenant, rows[-1].name


def after(connection: Connection, tenant: str, name: str = "") -> Iterator[Bank]:
    """Read the banks of a tenant one after the other, by name, from the first one after `name`."""
    statement = f"{_FIND} WHERE tenant = %s AND name > %s ORDER BY name LIMIT {_PAGE}"
    tenant, name = sought(tenant), sought(name)
    while found := raw(connection).execute(statement, (tenant, name), binary=True).fetchall():
        yield from map(bank_of, rows := [_row(row) for row in found])
        name = rows[-1].name


def usage(connection: Connection, bank_id: int) -> Usage | None:
    """Read the usage of a bank; None where it is not there."""
    found = raw(connection).execute(f"SELECT {', '.join(USAGE)} FROM banks WHERE bank_id = %s", (bank_id,), binary=True)
    row = found.fetchone()
    return None if row is None else Usage(*row)


def heads(connection: Connection, bank_ids: Sequence[int]) -> dict[int, Head]:
    """Read how far the changes of those of the banks go that are there."""
    statement = "SELECT bank_id, seq, trimmed, mark FROM banks WHERE bank_id = ANY(%s)"
    found = raw(connection).execute(statement, (list(bank_ids),), binary=True)
    return {bank_id: Head(*head) for bank_id, *head in found.fetchall()}


def current(
    connection: Connection, tenant: str, names: Sequence[str], now: int
) -> dict[str, tuple[Bank, Head, list[int]]]:
    """Read those banks of a tenant that are there, by name, with how far their changes go and with the chunks of each
    that have expired before a time unless a retrieval has renewed them: chunk_id, ttl, renew and expires of each, one
    after the other."""
    values = now, sought(tenant), [sought(name) for name in names]
    found = raw(connection).execute(_FIND_CURRENT, values, binary=True).fetchall()
    banks = [(bank_of(_row(row[:-4])), Head(*row[-4:-1]), row[-1]) for row in found]
    return {bank.name: (bank, head, expiring) for bank, head, expiring in banks}


def unchanged_values(bank: Bank, seq: int, mark: int, now: int) -> dict[str, object]:
    """Return the values of `UNCHANGED` for a bank. now: the time at which no chunk must have expired."""
    values = {"bank": bank.bank_id, "tenant": sought(bank.tenant), "name": sought(bank.name), "seq": seq}
    return {**values, "mark": mark, "now": now}


def is_unchanged(connection: Connection, values: dict[str, object]) -> bool:
    """Tell whether `UNCHANGED` holds for these values."""
    row = raw(connection).execute(f"SELECT {UNCHANGED}", values, binary=True).fetchone()
    return row is not None and bool(row[0])


def grow(connection: Connection, bank_id: int, grown: dict[str, int]) -> None:
    """Note by how much the usage of a bank has grown, in a transaction whose number is noted by `advance`, or which has
    changed nothing in the end."""
    if grown:
        changes = ", ".join(f"{name} = {name} + %({name})s" for name in grown)
        values = {**grown, "bank_id": bank_id}
        raw(connection).execute(f"UPDATE banks SET {changes} WHERE bank_id = %(bank_id)s", values)


def advance(connection: Connection, bank_id: int, seq: int, mark: int, grown: dict[str, int]) -> None:
    """Note that the transaction of the number `seq`, with this mark, has changed a bank, and by how much its usage has
    grown. The change itself must be in `changes`: a number that is not there is that of a database which was put
    back."""
    changes = "".join(f", {name} = {name} + %({name})s" for name in grown)
    values = {**grown, "bank_id": bank_id, "seq": seq, "mark": mark}
    raw(connection).execute(
        f"UPDATE banks SET seq = %(seq)s, mark = %(mark)s{changes} WHERE bank_id = %(bank_id)s", values
    )


def size_of_all(connection: Connection) -> tuple[int, int]:
    """Count the banks, and the bytes of their specs and metadata."""
    row = raw(connection).execute("SELECT count(*), coalesce(sum(size), 0)::int8 FROM banks", binary=True).fetchone()
    assert row is not None
    return row[0], row[1]


def totals(connection: Connection) -> tuple[int, int, int, int]:
    """Count the banks, and their live chunks, tokens and bytes."""
    sums = ", ".join(f"coalesce(sum({name}), 0)::int8" for name in ("chunks", "tokens", "bytes"))
    row = raw(connection).execute(f"SELECT count(*), {sums} FROM banks", binary=True).fetchone()
    assert row is not None
    return row[0], row[1], row[2], row[3]


def gone(connection: Connection) -> list[tuple[int, str]]:
    """Return id and uid of the deleted banks of which something is left."""
    found = raw(connection).execute("SELECT bank_id, uid FROM gone_banks ORDER BY bank_id", binary=True).fetchall()
    return [(bank_id, uid) for bank_id, uid in found]
