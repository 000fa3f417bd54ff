"""`kvbank check` and `kvbank repair` of a database with a bucket, while a service has it open."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib import import_module
from typing import Any

import pytest

from memory_service.care import store_check
from memory_service.care.copying.places import Place
from memory_service.domain.limits import ObjectLimits
from memory_service.storage.base import Engine
from memory_service.storage.postgres.schema import IDS_LOCK
from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.layout import key
from memory_service.storage.s3.opening import open_bucket
from tests.copying.test_copy import check_database
from tests.support import command
from tests.support.engines import opened
from tests.support.store import bank_now, held
from tests.support.whole_stores import fill_with_everything, put, seen

Change = Callable[..., Any]


@pytest.fixture
def made(place: Callable[[str], Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Engine]]:
    """Open a database with some of everything, as a service does."""
    database = place("postgres")
    with opened(database) as engine:
        fill_with_everything(engine)
        yield database, engine


@contextmanager
def changing(database: Mapping[str, Any]) -> Iterator[tuple[Change, Bucket]]:
    """Lend what changes rows behind the back of a service, and its bucket."""
    psycopg = import_module("psycopg")
    with psycopg.connect(database["data"]) as driver, closing(open_bucket(database["objects"])) as bucket:

        def change(statement: str, *values: object) -> None:
            assert driver.execute(statement, values).rowcount, statement

        yield change, bucket


def repair(database: Mapping[str, Any], *options: str, code: int = 0) -> Any:
    """Return what `kvbank repair` says, as JSON, or on stderr where it was refused."""
    arguments = ["repair", database["data"], "--objects", database["objects"], "--json", *options]
    ended = command.run(command.application(), *arguments)
    assert ended.exit_code == code, ended
    return json.loads(ended.stdout) if ended.stdout else ended.stderr


def kinds(problems: Any) -> Counter[str]:
    return Counter(problem["kind"] for problem in problems)


def test_a_database_is_mended_while_a_service_goes_on(made: tuple[Mapping[str, Any], Engine]) -> None:
    database, engine = made
    assert check_database(database)["problems"] == []
    assert repair(database) == {"ok": True, "dry_run": False, "done": [], "left": []}
    bank = next(bank for bank in seen(engine)["banks"] if bank.name == "b")
    lost, cut, flawed, unkeyed, spent, timed, uncounted, *_ = held(engine.store, bank)
    timed = put(engine, bank, 60)[0]
    with changing(database) as (change, bucket):
        bucket.delete([key(bank.uid, lost)])
        bucket.put(key(bank.uid, cut), [b"short"])
        change("UPDATE chunks SET text = text || 'x' WHERE chunk_id = %s", flawed)
        change("DELETE FROM keys WHERE chunk_id = %s", unkeyed)
        change("UPDATE keys SET gone = 1 WHERE chunk_id = %s", spent)
        change("UPDATE chunks SET expires = 2 * created WHERE chunk_id = %s", timed)
        change("DELETE FROM chunk_use WHERE chunk_id = %s", uncounted)
        change("UPDATE banks SET chunks = chunks + 7 WHERE bank_id = %s", bank.bank_id)
        change(
            "INSERT INTO evictions (bank_id, chunk_id, reason, retrieval_count, start, stored_length, created,"
            " evicted, meta) VALUES (999, 1, 'age', 0, 0, 0, 0, 0, '{}')"
        )
        change("UPDATE tenants SET quota = 'none' WHERE name = 'red'")
        change("UPDATE branches SET bytes = bytes + 1 WHERE branch = (SELECT min(branch) FROM branches)")
    expected = Counter(
        payload_missing=1, payload_damaged=1, record=1, key_missing=1, key=1, expiry=1, usage=3, orphan_row=1, tenant=1
    )
    found = check_database(database)["problems"]
    assert kinds(found) == expected
    planned = repair(database, "--dry-run")
    assert kinds(planned["done"]) == expected
    assert check_database(database)["problems"] == found
    done = repair(database)
    assert (done["ok"], done["left"]) == (True, [])
    assert {problem["chunk_id"] for problem in done["done"] if problem["done"] == "quarantined"} == {lost, cut, flawed}
    assert check_database(database)["problems"] == []
    # The service has learned of it, and goes on.
    assert not {lost, cut, flawed} & set(held(engine.store, bank))
    usage = bank_now(engine.store, bank).usage
    assert (usage.chunks, usage.chunks_quarantined) == (
        len(held(engine.store, bank)),
        bank.usage.chunks_quarantined + 3,
    )
    assert put(engine, bank, 60) == [timed]
    assert put(engine, bank, 61)[0] > timed


def test_objects_that_no_row_names_go_after_two_graces(made: tuple[Mapping[str, Any], Engine]) -> None:
    database, engine = made
    banks = {bank.name: bank for bank in seen(engine)["banks"]}
    strays = [key(banks["b"].uid, 999), key(banks["small"].uid, 999), key("a" * 16, 5)]
    place = Place(database["data"], database["objects"])
    with changing(database) as (_, bucket):
        for name in strays:
            bucket.put(name, [b"stray"])
        found = check_database(database, "--fast")
        assert (found["problems"], found["totals"]["objects_without_row"]) == ([], len(strays))
        database_repair = import_module("memory_service.care.database_repair")
        at_once = ObjectLimits(orphan_s=0, sweep_s=0)
        assert database_repair.repair(place, limits=at_once).done == []
        left = store_check.check(place, fast=True, limits=at_once).problems
        assert sorted(problem.path for problem in left) == sorted(strays)
        assert {problem.kind for problem in left} == {"orphan_file"}
        repaired = database_repair.repair(place, limits=at_once)
        assert (len(repaired.done), repaired.left) == (len(strays), [])
        assert not {item.key for page in bucket.pages("chunks") for item in page} & set(strays)
    assert check_database(database)["totals"]["objects_without_row"] == 0


@pytest.mark.slow
def test_ids_that_are_in_use_are_given_to_no_other_chunk(made: tuple[Mapping[str, Any], Engine]) -> None:
    database, engine = made
    bank = next(bank for bank in seen(engine)["banks"] if bank.name == "b")
    with changing(database) as (change, _):
        change("UPDATE keys SET chunk_id = 5000 WHERE gone IS NOT NULL")
    assert kinds(check_database(database)["problems"]) == Counter(id=1)
    assert kinds(repair(database)["done"]) == Counter(id=1)
    assert check_database(database)["problems"] == []
    with opened({**database, "cache": f"{database['cache']}-2"}) as other:
        assert put(other, bank, 70)[0] > 5000


BRANCH = "branch = (SELECT min(branch) FROM branches)"
FIRST = "chunk_id = (SELECT min(chunk_id) FROM chunks)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "service", "then", "stays"),
    [
        (
            "UPDATE keys SET chunk_id = 5000 WHERE gone IS NOT NULL",
            f"SELECT pg_advisory_xact_lock({IDS_LOCK})",
            "SELECT setval('chunk_ids', 1048577)",
            "SELECT last_value >= 1048577 FROM chunk_ids",
        ),
        (
            "UPDATE tenants SET quota = 'none' WHERE name = 'red'",
            "UPDATE tenants SET quota = '{\"banks\": 7}' WHERE name = 'red'",
            "",
            "SELECT quota LIKE '%7%' FROM tenants WHERE name = 'red'",
        ),
        (
            f"UPDATE branches SET bytes = bytes + 1 WHERE {BRANCH}",
            f"UPDATE branches SET bytes = bytes + (SELECT 7 * count(*) FROM turns WHERE {BRANCH}) WHERE {BRANCH}",
            f"UPDATE turns SET size = size + 7 WHERE {BRANCH}",
            "SELECT sum(bytes) = (SELECT sum(size) FROM turns) FROM branches",
        ),
        (
            f"UPDATE tenants SET quota = 'none' WHERE name = 'red';UPDATE chunks SET text = text || 'x' WHERE {FIRST}",
            "UPDATE tenants SET quota = '{}' WHERE name = 'red'",
            f"UPDATE chunks SET text = substring(text FROM 1 FOR length(text) - 1) WHERE {FIRST}",
            "SELECT NOT EXISTS (SELECT 1 FROM quarantine WHERE chunk_id < (SELECT min(chunk_id) FROM chunks))",
        ),
    ],
    ids=["ids", "quota", "turns", "chunk"],
)
def test_what_a_service_changes_while_a_repair_waits_for_it_stays(
    made: tuple[Mapping[str, Any], Engine], damage: str, service: str, then: str, stays: str
) -> None:
    database, _ = made
    database_repair, psycopg = import_module("memory_service.care.database_repair"), import_module("psycopg")
    with changing(database) as (change, _):
        change(damage)
    waits = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with (
        ThreadPoolExecutor(1) as threads,
        psycopg.connect(database["data"]) as other,
        psycopg.connect(database["data"], autocommit=True) as watch,
    ):
        other.execute(service)
        repairing = threads.submit(database_repair.repair, Place(database["data"], database["objects"]))
        while watch.execute(waits).fetchone() is None:
            assert not repairing.done()
        if then:
            other.execute(then)
        other.commit()
        assert repairing.result(60).left == []
        assert watch.execute(stays).fetchone() == (True,)


@pytest.mark.slow
def test_a_bucket_that_has_lost_all_payloads_is_not_taken_for_damaged_chunks(
    made: tuple[Mapping[str, Any], Engine],
) -> None:
    database, engine = made
    with changing(database) as (_, bucket):
        bucket.delete(item.key for page in bucket.pages("chunks") for item in page)
    before = seen_ids(engine)
    assert "has no payload at all" in repair(database, code=1)
    assert seen_ids(engine) == before


def seen_ids(engine: Engine) -> list[list[int]]:
    with engine.store.read() as view:
        banks = list(view.banks_of_all())
    return [held(engine.store, bank) for bank in banks]
