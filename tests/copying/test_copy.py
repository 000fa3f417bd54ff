"""A store is copied from a folder into a database with a bucket, and back again (`kvbank store copy`)."""

import json
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from memory_service.care.copying import tables
from memory_service.domain.errors import StartError
from memory_service.storage.local.files import layout
from memory_service.storage.s3.layout import key
from memory_service.storage.s3.opening import open_bucket
from tests.local.care.folders import database as database_of
from tests.local.care.folders import flip
from tests.support import bucket, command
from tests.support.bucket import Faulty, faulty
from tests.support.engines import ENGINES, opened
from tests.support.store import bank_now, held, new_bank
from tests.support.whole_stores import fill_with_everything, put, seen

Place = Mapping[str, Any]
# What an engine has beside what a copy carries: whole tables (None), which are its own numbers and leases, what is on
# its way out, is made anew, or is carried under another name; and columns.
OWN: Mapping[str, Mapping[str, set[str] | None]] = {
    "local": {
        **dict.fromkeys(("store", "clock", "gone_banks", "forgetting_ids", "keys", "unsynced")),
        "windows": {"file"},
    },
    "postgres": {
        **dict.fromkeys(("store", "clock", "gone_banks", "forgetting_ids", "chunk_use", "keys", "changes", "leases")),
        **dict.fromkeys(("marks", "purges", "alembic_version", "eviction_reserves")),
        "banks": {"size", "seq", "trimmed", "mark"},
        "chunks": {"tags"},
        "windows": {"file"},
        "eviction_plans": {"step", "victims"},
        "quarantine": {"bank_id", "record"},
    },
}
# Columns that are carried, and that an engine has in another form.
ELSEWHERE = {
    "postgres": {
        "chunks": {"retrieval_count", "last_retrieved"},
        "eviction_plans": {"plan"},
        "quarantine": {"row"},
    }
}


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """Set a proxy before the bucket, which can be made to fail."""
    if why := bucket.missing():
        pytest.skip(why)
    with faulty() as made:
        yield made


@pytest.fixture
def folder(place: Callable[[str], Place]) -> Place:
    """Make a folder with some of everything."""
    made = place("local")
    with opened(made) as engine:
        fill_with_everything(engine)
    return made


def run(source: Place, target: Place, *options: str, code: int = 0) -> Any:
    """Copy a store by the command, and return what it said, as JSON, or on stderr where it was refused."""
    arguments = ["store", "copy", source["data"], target["data"], "--json", *options]
    for name, place in (("--from-objects", source), ("--to-objects", target)):
        arguments += [name, place["objects"]] if "objects" in place else []
    ended = command.run(command.application(), *arguments)
    assert ended.exit_code == code, ended
    return json.loads(ended.stdout) if ended.stdout else ended.stderr


def look(place: Place) -> Mapping[str, Any]:
    with opened(place) as engine:
        return seen(engine)


def check(place: Place) -> Any:
    """Return the problems that `kvbank check` finds."""
    return json.loads(command.run(command.application(), "check", place["data"], "--json").stdout)["problems"]


def check_database(place: Place, *options: str) -> Any:
    """Return what `kvbank check` says of a database."""
    arguments = ["check", place["data"], "--objects", place["objects"], "--json", *options]
    return json.loads(command.run(command.application(), *arguments).stdout)


def file_of(place: Place, uid: str, chunk_id: int) -> Path:
    return Path(place["data"]) / layout.name(uid, chunk_id)


def failing(method: str, passing: int) -> Callable[[str], Any]:
    """Let so many requests for payloads pass, and refuse the others."""
    passed = iter([None] * passing)
    refused = (403, "AccessDenied")
    return lambda request: next(passed, refused) if request.startswith(method) and "/chunks/" in request else None


def aside(place: Place) -> Mapping[str, bytes]:
    """Return the files of chunks that are out of service."""
    root = Path(place["data"]) / "quarantine"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("*/*.safetensors")}


def test_a_store_is_the_same_in_a_database_and_in_a_folder_again(place: Callable[[str], Place], folder: Place) -> None:
    database, back = place("postgres"), place("local")
    before = look(folder)
    there = run(folder, database)
    assert (there["ok"], there["problems"]) == (True, [])
    with opened(database) as engine:
        assert seen(engine) == before
        assert "services have" in run(database, back, code=1)
        assert run(database, back, "--live")["ok"]
        identity, bank = engine.store.store_id, before["banks"][0]
        known = {chunk.chunk_id for chunks in before["chunks"].values() for chunk in chunks}
        # A write that is repeated at the copy is known, and a new one has a new id.
        (third,) = (chunk.chunk_id for chunk in before["chunks"][bank.uid] if chunk.start == 3)
        assert put(engine, bank, 3) == [third]
        assert put(engine, bank, 77)[0] > max(known)
    assert look(back) == before
    assert aside(back) == aside(folder) != {}
    assert check(back) == []
    with opened(back) as engine, opened(folder) as original:
        assert len({identity, engine.store.store_id, original.store.store_id}) == 3
        assert put(engine, bank, 77)[0] > max(known)


def test_a_copy_that_was_interrupted_goes_on_also_where_its_store_has_changed(
    place: Callable[[str], Place], folder: Place, proxy: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, back = place("postgres"), place("local")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.answers = failing("PUT", 4)
    assert "AccessDenied" in run(folder, database, code=1)
    proxy.answers = lambda _request: None
    with pytest.raises(StartError, match="unfinished copy of"), opened(database):
        pass
    assert "unfinished copy" in run(database, back, code=1)
    with opened(folder) as engine:
        bank = next(bank for bank in seen(engine)["banks"] if bank.name == "b")
        going, other, *_ = held(engine.store, bank)
        engine.store.remove(bank, [going]).result(60)
        engine.store.set_metadata(bank, other, {"half": "changed"})
        put(engine, bank, 50)
    again = run(folder, database)
    assert (again["ok"], again["totals"]["payloads"]) == (True, len(look(folder)["payloads"][bank.uid]))
    with opened(database) as engine:
        assert seen(engine) == look(folder)
    # And from there: what is written to a folder is there already when the run is made again.
    proxy.answers = failing("GET", 4)
    assert "AccessDenied" in run(database, back, code=1)
    proxy.answers = lambda _request: None
    with pytest.raises(StartError, match="unfinished copy of"), opened(back):
        pass
    assert "is an unfinished copy of" in run(folder, back, code=1)
    assert run(database, back)["ok"]
    assert look(back) == look(folder)


def test_what_is_damaged_is_named_by_copies_and_checks_and_left_out_only_where_that_is_asked_for(
    place: Callable[[str], Place], folder: Place
) -> None:
    database, back = place("postgres"), place("local")
    before = look(folder)
    bank = before["banks"][0]
    first, second, third, *rest = [chunk.chunk_id for chunk in before["chunks"][bank.uid]]
    file_of(folder, bank.uid, first).unlink()
    flip(file_of(folder, bank.uid, second))
    with database_of(folder["data"]) as driver:
        driver.execute("UPDATE chunks SET payload_bytes = 'many' WHERE chunk_id = ?", (third,))
        driver.execute("UPDATE sessions SET head = head + 1 WHERE tenant = 'red' AND name IS NULL")
    kinds = {"payload_missing": first, "payload_damaged": second, "record": third, "session": None}
    for options, code in (((), 1), (("--skip-damaged",), 0)):
        said = run(folder, database, *options, code=code)
        assert said["ok"] == (code == 0)
        assert {problem["kind"]: problem["chunk_id"] for problem in said["problems"]} == kinds
    assert said["totals"]["reused"] == said["totals"]["payloads"] == len(rest)
    with opened(database) as engine:
        assert held(engine.store, bank) == rest
        usage = bank_now(engine.store, bank).usage
        assert (usage.chunks, usage.chunks_quarantined) == (len(rest), bank.usage.chunks_quarantined + 3)
    assert run(database, back)["problems"] == []
    # The turns of the session that is lost are there, as in the folder.
    assert {problem["kind"] for problem in check(back)} == {"session"}
    found = check_database(database)
    assert (found["problems"], found["totals"]["read"], found["totals"]["objects_without_row"]) == ([], len(rest), 0)
    there, size = open_bucket(database["objects"]), found["totals"]["payload_bytes"]
    for chunk_id, data in ((rest[0], None), (rest[1], b"short"), (99, b"no row")):
        there.delete([key(bank.uid, chunk_id)])
        there.put(key(bank.uid, chunk_id), [data]) if data is not None else None
    psycopg = import_module("psycopg")
    with psycopg.connect(database["data"]) as driver:
        driver.execute("UPDATE banks SET bytes = bytes + 1 WHERE uid = %s", (bank.uid,))
        driver.execute("UPDATE chunks SET text = text || 'x' WHERE chunk_id = %s", (rest[2],))
    found = check_database(database, "--sample", "1")
    expected = {"payload_missing": rest[0], "payload_damaged": rest[1], "record": rest[2], "usage": None}
    assert {problem["kind"]: problem["chunk_id"] for problem in found["problems"]} == expected
    assert (found["totals"]["objects_without_row"], found["totals"]["payload_bytes"] < size) == (1, True)
    assert {problem["kind"] for problem in check_database(database, "--fast")["problems"]} == expected.keys()


def test_a_place_that_cannot_be_copied_is_refused_in_one_line(place: Callable[[str], Place], folder: Place) -> None:
    database, empty, new = place("postgres"), place("postgres"), {"data": Path(folder["data"]).parent / "new"}
    bare, objects = {"data": database["data"]}, {"data": folder["data"], "objects": "s3://bucket"}
    stranger = {"data": Path(folder["data"]).parent}
    for source, target, said in (
        (stranger, new, "has no metadata.db"),
        ({"data": "missing"}, new, "there is no folder"),
        ({"data": "mysql://host/x"}, new, "mysql:// is no place for data"),
        (bare, new, "--from-objects s3://BUCKET/PREFIX"),
        (folder, bare, "--to-objects s3://BUCKET/PREFIX"),
        (folder, objects, "--to-objects is for data in a database"),
        (folder, folder, "exists and is not an empty folder"),
        (folder, stranger, "exists and is not an empty folder"),
        (folder, {"data": "missing/folder"}, "there is no folder"),
        ({**empty, "objects": "s3://kvbank-test/other"}, new, "has no payloads of the store"),
        (folder, {**empty, "data": "postgresql://127.0.0.1:1/x"}, "cannot open postgresql://127.0.0.1:1/x: "),
    ):
        assert said in run(source, target, code=1), (source, target)
    assert not new["data"].exists()
    with opened(folder) as engine:
        engine.store.create_bank(new_bank("more"))
        assert "is being served" in run(folder, empty, code=1)
    with opened(database) as engine:
        engine.store.create_bank(new_bank("own"))
    assert "has a store already" in run(folder, database, code=1)


@pytest.mark.parametrize("kind", OWN)
def test_every_table_and_every_column_of_an_engine_is_carried_or_made_anew(kind: str) -> None:
    if why := ENGINES[kind].missing():
        pytest.skip(why)
    module = {"local": "local.records.tables", "postgres": "postgres.schema"}[kind]
    metadata = import_module(f"memory_service.storage.{module}").METADATA
    found: dict[str, set[str]] = {}
    for table in metadata.tables.values():
        name = "chunks" if table.name == "contents" else table.name
        found.setdefault(name, set()).update(column.name for column in table.columns)
    carried = {table.name: set(table.columns) for table in tables.ALL}
    for name, columns in found.items():
        own = OWN[kind].get(name, set())
        if own is not None:
            assert columns - own == carried[name] - ELSEWHERE.get(kind, {}).get(name, set()), name
