"""Folders of released schemas are upgraded with all that they hold."""

import json
import os
import sqlite3
from contextlib import closing

import grpc
import pytest

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.care.check import check
from memory_service.domain.access import KeyPlace
from memory_service.domain.errors import StartError
from memory_service.domain.tenants import TenantQuota
from memory_service.storage.local.records import access_rows, schema
from tests.support.caller import stored_bytes
from tests.support.sessions import SessionCaller
from tests.support.waiting import wait_until

AXES = [tuple(float(i == axis) for i in range(4)) for axis in range(4)]
# A caller that is made anew begins with the same keys.
NEW_KEY = b"a key not used.."
# Where the columns of a table of schema 0001 are today.
SOURCES_0001 = {
    "store": "new.store",
    "banks": "new.banks",
    "chunks": "new.chunks JOIN new.contents USING (chunk_id)",
    "spent_keys": "new.spent_keys",
    "evictions": "new.evictions",
}


# Those of schema 0003 have the same names today.
TABLES_0003 = (
    *("store", "clock", "banks", "gone_banks", "chunks", "contents"),
    *("keys", "spent_keys", "evictions", "eviction_plans"),
)
TABLES_0005 = (*TABLES_0003, "tenants", "api_keys", "sessions", "branches", "turns", "windows")


def to(version, data, sources):
    """Make the folder's database one of an earlier schema, with the same content. sources: the tables of that schema,
    and where their columns are today."""
    old = data / "old.db"
    schema.upgrade(old, version)
    with closing(sqlite3.connect(old)) as database:
        database.execute("ATTACH ? AS new", (str(data / "metadata.db"),))
        for table, source in sources.items():
            names = ", ".join(name for _, name, *_ in database.execute(f"PRAGMA main.table_info({table})"))
            database.execute(f"INSERT OR REPLACE INTO main.{table} ({names}) SELECT {names} FROM {source}")
        database.execute("DELETE FROM main.sqlite_sequence")
        database.execute("INSERT INTO main.sqlite_sequence SELECT * FROM new.sqlite_sequence")
        database.commit()
    os.replace(old, data / "metadata.db")


def to_0001(data):
    """Make the folder's database one of the first schema."""
    to("0001", data, SOURCES_0001)


def to_0004(data):
    """Make the folder's database one of the fourth schema, in which there are no sessions."""
    to("0004", data, {table: f"new.{table}" for table in (*TABLES_0003, "tenants", "api_keys")})


def to_0005(data):
    """Make the folder's database one of the fifth schema, in which nothing was forgotten."""
    to("0005", data, {table: f"new.{table}" for table in TABLES_0005})


def to_0006(data):
    """Make the folder's database one of the sixth schema."""
    to("0006", data, {table: f"new.{table}" for table in (*TABLES_0005, "forgettings", "gone_branches")})


def to_0003(data):
    """Make the folder's database one of the third schema, in which there are no tenants."""
    to("0003", data, {table: f"new.{table}" for table in TABLES_0003})


def to_0002(data, **bounds):
    """Make the folder's database one of the second schema, with the same content: bytes of tensors alone, and for the
    bank "b" the bounds as JSON."""
    to_0003(data)
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        database.execute("DROP TABLE clock")
        database.execute("ALTER TABLE chunks DROP COLUMN size")
        bytes_ = "(SELECT coalesce(sum(payload_bytes), 0) FROM chunks WHERE chunks.bank_id = banks.bank_id)"
        database.execute(f"UPDATE banks SET bytes = {bytes_}")
        for column, bound in bounds.items():
            database.execute(f"UPDATE banks SET {column} = ? WHERE name = 'b'", (bound,))
        database.execute("UPDATE alembic_version SET version_num = '0002'")
        database.commit()
        database.execute("PRAGMA auto_vacuum=NONE")
        database.execute("VACUUM")


def everything(caller):
    """Return what a client can know of the two banks."""
    banks = caller.stub.ListBanks(pb.ListBanksRequest()).banks
    chunks = [
        chunk
        for bank in banks
        for chunk in caller.stub.ListChunks(pb.ListChunksRequest(bank=bank.name, with_embedding=True)).chunks
    ]
    evictions = caller.stub.ListEvictions(pb.ListEvictionsRequest(bank="c")).evictions
    return list(banks), chunks, list(evictions), caller.retrieve(AXES[1], skip_count=True)[1]


def test_upgrade_from_0001(serving, data):
    caller = serving()
    caller.create(metadata={"a": "b"})
    caller.create("c", layers=[], capacity={"chunks": 2}, policy={"kind": bank_pb2.POLICY_KIND_RECENCY_HALF})
    written = [caller.chunk(axis) for axis in AXES]
    acks = caller.write(*written)
    caller.retrieve(AXES[2], top_k=1)
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[acks[0].chunk_id]))
    for _ in range(3):
        caller.add(bank="c", layers=[])
    before = everything(caller)
    serving.stop()
    to_0001(data)
    with pytest.raises(StartError, match="older schema 0001"):
        serving()
    caller = serving(migrate=True)
    assert everything(caller) == before
    again = caller.write(*written)
    assert [(ack.chunk_id, ack.replayed, ack.gone) for ack in again] == [
        (ack.chunk_id, True, place == 0) for place, ack in enumerate(acks)
    ]
    assert caller.add(idempotency_key=NEW_KEY) > max(ack.chunk_id for ack in acks)


def test_what_an_upgraded_bank_can_do(serving, data, refused):
    """Upgraded banks have no quota and no expiry, until they are given them."""
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    serving.stop()
    to_0001(data)
    caller = serving(migrate=True)
    bank = caller.stub.GetBank(pb.GetBankRequest(name="b")).bank
    assert (bank.HasField("quota"), bank.HasField("expiry"), bank.index) == (False, False, 0)
    assert caller.stub.PinChunks(pb.PinChunksRequest(bank="b", chunk_ids=[chunk_id], pinned=True)).found == 1
    update = pb.UpdateBankRequest(bank=bank_pb2.Bank(name="b", quota={"chunks": 1}), update_mask={"paths": ["quota"]})
    caller.stub.UpdateBank(update)
    with refused("QUOTA_EXCEEDED", grpc.StatusCode.RESOURCE_EXHAUSTED):
        caller.add(idempotency_key=NEW_KEY)
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[chunk_id]))
    caller.add(idempotency_key=NEW_KEY)


def test_upgrade_from_0002_counts_anew_and_no_chunk_goes_for_that(serving, data, refused):
    """Bounds in bytes were of tensors alone; they rise by the rest of what there is."""
    caller = serving()
    caller.create(metadata={"a": "b"})
    written = [caller.chunk(axis) for axis in AXES]
    caller.write(*written)
    serving.stop()
    tensors, whole = sum(len(data) for _, data in written), sum(stored_bytes(*each) for each in written)
    bound = tensors + 100
    to_0002(data, capacity=f'{{"unit": "bytes", "limit": {bound}}}', quota=f'{{"bytes": {bound}}}')
    with pytest.raises(StartError, match="older schema 0002"):
        serving()
    caller = serving(migrate=True)
    bank = caller.stub.GetBank(pb.GetBankRequest(name="b")).bank
    assert (bank.usage.bytes, bank.capacity.bytes, bank.quota.bytes) == (whole, whole + 100, whole + 100)
    assert len(caller.ids()) == len(written)
    assert [ack.replayed for ack in caller.write(*written)] == [True] * len(written)
    stats = caller.stub.GetStats(pb.GetStatsRequest())
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=caller.ids()))
    assert caller.usage().bytes == 0
    assert caller.stub.Compact(pb.CompactRequest()).database_bytes <= stats.database_bytes
    assert caller.stub.GetStats(pb.GetStatsRequest()).database_free_bytes == 0
    serving.stop()
    assert check(data).problems == []


def test_upgrade_from_0003_gives_the_default_tenant_what_there_is(serving, data):
    """Ids of banks go on, also where the last bank was deleted, so that rows of an old one are not those of a new
    one."""
    caller = serving()
    caller.create(metadata={"a": "b"})
    caller.create("c", layers=[], capacity={"chunks": 2})
    written = [caller.chunk(axis) for axis in AXES]
    acks = caller.write(*written)
    for _ in range(3):
        caller.add(bank="c", layers=[])
    caller.create("last", layers=[])
    last = serving.server.banks.store.bank("default", "last").bank_id
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="last"))
    before = everything(caller)
    serving.stop()
    to_0003(data)
    with pytest.raises(StartError, match="older schema 0003"):
        serving()
    caller = serving(migrate=True)
    assert everything(caller) == before
    assert [ack.chunk_id for ack in caller.write(*written)] == [ack.chunk_id for ack in acks]
    engine = serving.server.banks.engine
    assert {bank.tenant for bank in engine.store.known_banks()} == {"default"}
    assert [(tenant.name, tenant.quota) for tenant in engine.access.tenants()] == [("default", TenantQuota())]
    assert engine.access.keys_of() == []
    caller.create("next", layers=[])
    assert engine.store.bank("default", "next").bank_id > last
    serving.stop()
    assert check(data).problems == []


def test_upgrade_from_0004_adds_sessions_and_changes_nothing_else(serving, data):
    caller = serving()
    caller.create(metadata={"a": "b"})
    caller.create("c", layers=[], capacity={"chunks": 2})
    caller.write(*(caller.chunk(axis) for axis in AXES))
    for _ in range(3):
        caller.add(bank="c", layers=[])
    serving.server.banks.engine.access.add_tenant("red", TenantQuota(banks=2))
    before = everything(caller)
    serving.stop()
    to_0004(data)
    with pytest.raises(StartError, match="older schema 0004"):
        serving()
    caller = serving(migrate=True)
    assert everything(caller) == before
    assert serving.server.banks.engine.access.tenant("red").quota == TenantQuota(banks=2)
    sessions = SessionCaller(caller.channel)
    session = sessions.create(name="a").session_id
    sessions.talk(session, sessions.acquire(session).epoch, 0, "hello")
    assert sessions.texts(session) == ["hello"]
    serving.stop()
    assert check(data).problems == []


def test_upgrade_from_0005_lets_turns_be_forgotten(serving, data):
    sessions = SessionCaller(serving().channel)
    session = sessions.create(name="a").session_id
    sessions.talk(session, sessions.acquire(session).epoch, 0, "hello", "again")
    serving.stop()
    to_0005(data)
    with pytest.raises(StartError, match="older schema 0005"):
        serving()
    sessions = SessionCaller(serving(migrate=True).channel)
    assert sessions.texts(session) == ["hello", "again"]
    assert sessions.forget_turns(session, 1, 1).turns == 1
    assert [each.items[0].text for each in sessions.turns(session) if each.items] == ["again"]
    serving.stop()
    assert check(data).problems == []


def test_upgrade_from_0006_finishes_what_is_being_forgotten(serving, data):
    caller = serving()
    caller.create()
    chunk_ids = [caller.add() for _ in range(3)]
    serving.stop()
    to_0006(data)
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        ((bank_id, uid),) = database.execute("SELECT bank_id, uid FROM banks")
        work = json.dumps({"kind": "chunks", "bank": bank_id, "uid": uid, "ids": chunk_ids[:2]})
        counts = json.dumps({"chunks": [], **dict.fromkeys(("turns", "tokens", "bytes"), 0), "places": {}})
        row = ("r", "default", "chunks", "", "chunks of bank b by a filter", 1, counts, work)
        database.execute("INSERT INTO forgettings VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        database.commit()
    caller = serving(migrate=True)
    wait_until(lambda: caller.ids() == chunk_ids[2:])
    serving.stop()
    assert check(data).problems == []


def test_a_quota_without_calls_is_one_that_does_not_bound_them(serving, data):
    """Read the quota of a tenant as it was written before quotas had calls."""
    serving()
    serving.server.banks.engine.access.add_tenant("red", TenantQuota(banks=2, calls=5))
    serving.stop()
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        older = '{"banks": 2, "chunks": 0, "tokens": 0, "bytes": 7}'
        database.execute("UPDATE tenants SET quota = ? WHERE name = 'red'", (older,))
        database.commit()
    serving()
    assert serving.server.banks.engine.access.tenant("red").quota == TenantQuota(banks=2, bytes=7)


def test_a_part_of_the_keys_is_read_by_an_index(tmp_path):
    """Ask SQLite how it reads the keys of a tenant, and all keys: neither scans the others, nor sorts."""
    path = tmp_path / "metadata.db"
    schema.create(path)
    database = schema.engine(path, synchronous="FULL", writer=False)
    with database.connect() as connection:
        said = list[str]()
        schema.raw(connection).set_trace_callback(said.append)
        for tenant in ("red", None):
            assert list(access_rows.keys(connection, tenant, KeyPlace(1, "k"), 10)) == []
        schema.raw(connection).set_trace_callback(None)
        asked = [statement for statement in said if "FROM api_keys" in statement]
        plans = [connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}").all() for statement in asked]
        connection.rollback()
    database.dispose()
    assert [[row.detail.partition(" (")[0] for row in plan] for plan in plans] == [
        ["SEARCH api_keys USING INDEX ix_api_keys_tenant_created_key_id"],
        ["SEARCH api_keys USING INDEX ix_api_keys_created_key_id"],
    ]
