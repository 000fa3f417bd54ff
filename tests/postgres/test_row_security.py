"""The second belt between tenants: what a statement with a mistake sees and changes, over the role of a service that
owns no table."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Connection

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.domain.model import Bank, Capacity, Policy
from memory_service.domain.sessions import Session, new_session_id
from memory_service.domain.tenants import TenantQuota
from memory_service.storage.base import Engine
from memory_service.storage.postgres.database import Database, raw
from memory_service.storage.postgres.row_security import OF_BANK, OF_TENANT
from tests.support import postgres
from tests.support.caller import Caller
from tests.support.engines import ENGINES, opened
from tests.support.store import DIMENSION, add, fill, held, new_bank, new_chunk, reason

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
# Rows that name a tenant or a bank, and are the operator's or tell services what to drop.
FOR_ALL = {"api_keys", "purges"}
COLUMNS = """
    SELECT DISTINCT table_name FROM information_schema.columns WHERE table_schema = 'public'
    AND column_name IN ('tenant', 'bank_id') AND table_name NOT LIKE 'chunks\\___'
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    with KIND.place(tmp_path) as made:
        yield made


def of_red(engine: Engine) -> Bank:
    """Let the tenants `red` and `blue` be there, and red have a bank with chunks, evictions, and a session."""
    for name in ("red", "blue"):
        engine.access.add_tenant(name, TenantQuota())
    bank, _ = engine.store.create_bank(new_bank(tenant="red", capacity=Capacity("chunks", 8), policy=Policy("lru")))
    fill(engine.store, bank, range(12))
    engine.store.create_bank(new_bank(tenant="blue"))
    engine.sessions.create(Session(new_session_id(), "s", bank.name, tenant="red"))
    return bank


def test_a_statement_for_another_tenant_sees_nothing_and_changes_nothing(place: Mapping[str, Any]) -> None:
    with opened(place) as engine:
        bank = of_red(engine)
    with psycopg.connect(place["data"], autocommit=True) as service:

        def rows(table: str) -> int:
            ((count,),) = service.execute(f"SELECT count(*) FROM {table}").fetchall()
            return int(count)

        named = {table for (table,) in service.execute(COLUMNS).fetchall()}
        assert named == {*OF_TENANT, *OF_BANK, *FOR_ALL}
        filled = {table for table in (*OF_TENANT, *OF_BANK) if rows(table)}
        assert {"banks", "chunks", "chunk_use", "keys", "changes", "evictions", "sessions", "branches"} <= filled
        service.execute("SET kvbank.tenant = 'blue'")
        assert [rows(table) for table in filled - {"banks"}] == [0] * (len(filled) - 1)
        assert service.execute("SELECT tenant FROM banks").fetchall() == [("blue",)]
        for table in filled - {"banks"}:
            assert service.execute(f"DELETE FROM {table}").rowcount == 0
        assert service.execute("UPDATE banks SET name = 'x' WHERE tenant = 'red'").rowcount == 0
        for statement in (
            f"INSERT INTO chunk_use (chunk_id, bank_id) VALUES (999999, {bank.bank_id})",
            f"INSERT INTO keys (bank_id, key, chunk_id, digest) VALUES ({bank.bank_id}, 'k', 1, 'd')",
            "UPDATE banks SET tenant = 'red'",
        ):
            with pytest.raises(InsufficientPrivilege):
                service.execute(statement)
        service.execute("RESET kvbank.tenant")
        assert all(rows(table) for table in filled)
        assert sum(rows(f"chunks_{number:02}") for number in range(16)) == 0


def test_a_call_whose_bank_is_of_another_tenant_finds_and_changes_nothing(place: Mapping[str, Any]) -> None:
    with opened(place) as engine:
        bank = of_red(engine)
        ids = held(engine.store, bank)
        # As a mistake would have it: the id of another tenant's bank.
        mistaken = replace(bank, tenant="blue")
        with engine.store.read("blue") as view:
            assert not view.exists(bank)
            assert view.chunk(bank, ids[0]) is None
            assert list(view.chunks(bank, ids)) == []
            assert len(view.ids(bank)) == 0
            found = view.nearest(bank, np.ones(DIMENSION, np.float32), 9, None, view.ids(bank))
            assert found is not None
            assert len(found[0]) == 0
            assert list(view.evictions(bank, 2**62)) == []
        assert reason(lambda: add(engine.store, mistaken, 20)) == "BANK_NOT_FOUND"
        assert engine.store.replay_of(mistaken, new_chunk(11).key, None) is None
        assert engine.store.remove(mistaken, ids).result(60) == []
        assert engine.store.pin(mistaken, ids, True) == 0
        assert not engine.store.set_metadata(mistaken, ids[0], {})
        assert held(engine.store, bank) == ids
        with engine.sessions.read("blue") as sessions:
            assert list(sessions.sessions("red", None, {})) == []
        assert engine.store.replay_of(bank, new_chunk(11).key, None) is not None


def test_a_connection_works_for_whom_it_was_taken_whoever_had_it_before(place: Mapping[str, Any]) -> None:
    with opened(place) as engine:
        of_red(engine)
    database = Database(place["data"])

    def tenants(connection: Connection) -> list[str]:
        found = raw(connection).execute("SELECT tenant FROM banks ORDER BY tenant").fetchall()
        return [tenant for (tenant,) in found]

    def refused(connection: Connection) -> None:
        seen.append(tenants(connection))
        raise KeyError

    for name, all_seen in (("red", ["red"]), ("blue", ["blue"]), ("", ["blue", "red"]), ("none", []), ("re'd", [])):
        own, seen = database.of(name), list[list[str]]()
        for _ in range(2):
            with own.read() as connection:
                seen.append(tenants(connection))
            seen.append(own.change(tenants))
            with suppress(KeyError):
                own.change(refused)
            seen.append(own.change(tenants, first=lambda connection: raw(connection).execute("SELECT 1")))
            seen.append(own.ask(tenants))
            with own.look() as connection:
                seen.append(tenants(connection))
            with own.lent() as connection:
                seen.append(tenants(connection))
            seen.append(database.of("blue").ask(tenants))
        assert seen == [*[all_seen] * 7, ["blue"]] * 2
    database.close()


def test_what_says_a_tenant_takes_no_place_among_the_statements_that_are_prepared(place: Mapping[str, Any]) -> None:
    database = Database(place["data"])
    for name in [f"tenant-{number}" for number in range(3)] * 6:
        database.of(name).change(lambda _: None, first=lambda connection: raw(connection).execute("SELECT 1"))
    prepared = database.ask(
        lambda connection: raw(connection).execute("SELECT statement FROM pg_prepared_statements").fetchall()
    )
    assert [statement for (statement,) in prepared if "tenant-" in statement] == []
    database.close()


def test_each_call_for_chunks_says_its_tenant(place: Mapping[str, Any]) -> None:
    """Let a connection that says no tenant see no chunk, and make the calls of one tenant."""
    with LocalServer(**{**place, "durability": "os"}) as server:
        caller = Caller(server.address)
        caller.create(capacity={"chunks": 3}, policy={"kind": bank_pb2.POLICY_KIND_LRU})
        first = caller.add()
        caller.retrieve()  # its index is in memory from here on
        with psycopg.connect(postgres.of(place["data"], postgres.OWNER), autocommit=True) as owner:
            for table in ("chunks", "chunk_use", "keys", "evictions"):
                owner.execute(f"ALTER POLICY tenant ON {table} USING (current_setting('kvbank.tenant', true) <> '')")
        more = [caller.add((0, 1, 0, 0)) for _ in range(3)]
        assert set(caller.retrieve((0, 1, 0, 0))[1]) == set(caller.fetch(*more)) == {*caller.ids()} == {*more}
        evicted = caller.stub.ListEvictions(pb.ListEvictionsRequest(bank="b")).evictions
        assert [each.chunk_id for each in evicted] == [first]
        assert caller.stub.ExplainEviction(pb.ExplainEvictionRequest(bank="b", need=1)).victims[0].chunk_id == more[0]
        assert caller.pin(more[0]) == 1
        assert caller.get(more[0]).pinned
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=more))
        assert caller.ids() == []
        caller.channel.close()
