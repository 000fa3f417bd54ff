"""`kvbank backup` into a bucket and `kvbank restore` out of it, also beside a server."""

import json
from contextlib import closing

import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.care.backup import backup
from memory_service.storage.s3.opening import open_bucket
from tests.local.care.folders import answer, clean, execute, file_of, flip, kinds, refusal, run
from tests.support import bucket as s3
from tests.support.bucket import PAST


@pytest.fixture
def proxy(monkeypatch):
    """Set a proxy before the bucket, which can be made to fail, and which notes the requests."""
    if why := s3.missing():
        pytest.skip(why)
    with s3.faulty() as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


@pytest.fixture
def place(proxy):
    """Name a prefix in which nothing is."""
    return f"s3://{s3.NAME}/{s3.new_prefix()}"


def sent(proxy, folder):
    """Return how many objects were sent since the last call, whose keys begin with a word."""
    found = [request for request in proxy.seen if request.startswith("PUT") and f"/store/{folder}" in request]
    proxy.seen.clear()
    return len(found)


def keys(place, folder):
    with closing(open_bucket(place)) as bucket:
        return [item.key for page in bucket.pages(folder) for item in page]


def refusing(method, folder, passing):
    """Let so many requests of a kind pass, and refuse those that come then."""
    left = iter([None] * passing)
    asked = f"/store/{folder}"
    return lambda request: (
        next(left, (403, "AccessDenied")) if request.startswith(method) and asked in request else None
    )


def payloads_of(folder, connect):
    """Serve a folder, and return the payloads of its chunks by id."""
    with LocalServer(folder, min_free=0) as server, connect(server.address, first_key=5000) as caller:
        return caller.retrieve(top_k=10)[1]


def test_a_backup_in_a_bucket_is_brought_up_to_date_and_gives_the_same_bits(
    filled, serving, data, tmp_path, connect, proxy, place
):
    serving()
    assert answer("backup", data, place)["totals"] | {"payload_bytes": 0} == {
        **{"banks": 2, "chunks": 5, "payloads": 4, "payload_bytes": 0, "copied": 4, "gone_meanwhile": 0}
    }
    assert (len(keys(place, "payloads")), sent(proxy, "payloads")) == (4, 4)
    with connect(serving.server.address, first_key=1000) as caller:
        gone, new = next(iter(filled)), caller.add((0, 0, 0, 1))
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[gone]))
        stored = caller.retrieve(top_k=10)[1]
        identity = caller.stub.GetServerInfo(pb.GetServerInfoRequest()).store_id
    totals = answer("backup", data, place)["totals"]
    assert (totals["copied"], totals["reused"], sent(proxy, "payloads")) == (1, 3, 1)
    left = {int(key.rsplit("/", 1)[1][:20]) for key in keys(place, "payloads")}
    assert left == (filled.keys() | {new}) - {gone}
    assert "4 payloads" in run("check", place).stdout
    assert answer("check", place, "--fast")["ok"]
    serving.stop()
    restored = answer("restore", place, tmp_path / "new")
    assert (restored["totals"]["copied"], restored["store_id"] != identity) == (4, True)
    clean(tmp_path / "new")
    assert payloads_of(tmp_path / "new", connect) == stored


def test_a_backup_into_a_bucket_that_was_interrupted_goes_on_and_leaves_the_one_before(
    filled, data, tmp_path, proxy, place
):
    run("backup", data, place)
    before = json.loads(run("restore", place, tmp_path / "first", "--json").stdout)["totals"]
    execute(data, "UPDATE banks SET meta = '{\"changed\": 1}' WHERE name = 'b'")
    for folder, passing in (("records", 0), ("backup.json", 0)):
        proxy.answers = refusing("PUT", folder, passing)
        assert "AccessDenied" in refusal("backup", data, place)
        proxy.answers = lambda _request: None
        assert answer("check", place)["totals"]["chunks"] == before["chunks"]
    other = place.replace("/store", "/more/store")
    proxy.answers = refusing("PUT", "payloads", 2)
    assert "AccessDenied" in refusal("backup", data, other)
    proxy.answers = lambda _request: None
    again = answer("backup", data, other)["totals"]
    assert (again["reused"] >= 2, again["reused"] + again["copied"]) == (True, 4)
    # And a restore: what it has brought is there when it is called again.
    proxy.answers = refusing("GET", "payloads", 2)
    assert "AccessDenied" in refusal("restore", place, tmp_path / "new")
    proxy.answers = lambda _request: None
    again = answer("restore", place, tmp_path / "new")["totals"]
    assert (again["reused"], again["copied"]) == (2, 2)
    clean(tmp_path / "new")


@pytest.mark.slow
def test_damage_in_a_bucket_is_found_and_restored_around_and_mended_by_the_next_backup(
    filled, data, tmp_path, proxy, place
):
    run("backup", data, place)
    first, second, *_ = keys(place, "payloads")
    with closing(open_bucket(place)) as bucket:
        bucket.put(first, [bytearray(bucket.whole(first))[:-1] + b"x"])
        bucket.put(second, [b"short"])
    assert kinds(answer("check", place, code=1)) == ["payload_damaged"]
    assert kinds(answer("check", place, "--fast", code=1)) == ["payload_missing"]
    assert len(answer("restore", place, tmp_path / "new", code=1)["problems"]) == 2
    assert not (tmp_path / "new").exists()
    assert answer("restore", place, tmp_path / "new", "--skip-damaged")["totals"]["payloads"] == 2
    clean(tmp_path / "new")
    # One that is not whole is sent again; of one whose size is right a backup sees nothing.
    assert answer("backup", data, place)["totals"]["copied"] == 1
    # Damage in the folder is left out where the bucket does not have the payload yet.
    flip(file_of(data, 2))
    other = place.replace("/store", "/other/store")
    assert kinds(answer("backup", data, other, code=1)) == ["payload_damaged"]
    assert (answer("backup", data, place)["ok"], len(keys(other, "payloads"))) == (True, 3)
    with closing(open_bucket(place)) as bucket:
        bucket.delete(keys(place, "records"))
    assert "a part of its records" in refusal("restore", place, tmp_path / "more")


def test_what_is_no_place_for_a_backup_is_refused_in_one_line(filled, data, tmp_path, proxy, place):
    assert "is not a backup of kvbank" in refusal("restore", place, tmp_path / "new")
    run("backup", data, place)
    run("restore", place, tmp_path / "new")
    assert "has a backup of another store" in refusal("backup", tmp_path / "new", place)
    run("backup", data, tmp_path / "old")
    assert "--base is for backups in folders" in refusal("backup", data, place, "--base", tmp_path / "old")
    assert "is no place of objects" in refusal("backup", data, "s3://")
    assert "is not an empty folder" in refusal("restore", place, data)
    assert "no place for data" in refusal("restore", place, "s3://bucket/prefix", code=2)
    assert "no place for data" in refusal("backup", "s3://bucket/prefix", tmp_path / "x", code=2)
    with closing(open_bucket(place)) as bucket:
        text = bucket.whole("backup.json")

        def meanwhile(request):
            if request.startswith("PUT") and "records/" in request:
                bucket.put("backup.json", [text.replace(b'"created"', b'"made"')])

        execute(data, "UPDATE banks SET meta = '{\"changed\": 1}' WHERE name = 'b'")
        proxy.answers = meanwhile
        assert "another backup was made" in refusal("backup", data, place)


def test_a_backup_leaves_alone_what_is_not_its_own(filled, data, proxy, place):
    others = ("payloads/notes.txt", "payloads/of-somebody/00000000000000000007", "records/2026.csv", "more/of/it")
    with closing(open_bucket(place)) as bucket:
        for key in others:
            bucket.put(key, [b"not of a backup"])
        for _ in range(2):
            run("backup", data, place)
            assert [key for key in others if bucket.size(key) != 15] == []
    assert answer("check", place, "--fast")["ok"]


@pytest.mark.slow
def test_a_backup_that_is_brought_up_to_date_while_it_is_read_is_not_taken_for_a_damaged_one(
    filled, serving, data, tmp_path, proxy, place
):
    caller = serving()
    run("backup", data, place)
    for gone, command, *options in ((1, "check"), (2, "check", "--fast"), (3, "restore", tmp_path / "new")):
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[gone]))
        asked = f"/{gone:020}-" if "--fast" not in options else "list-type"

        def meanwhile(request, asked=asked):
            if request.startswith("GET") and "payloads" in request and asked in request:
                proxy.answers = lambda _request: None
                backup(data, place)

        proxy.answers = meanwhile
        assert "another backup was made" in refusal(command, place, *options)
        assert answer(command, place, *options)["ok"]
    # What was brought before is there for the next run.
    assert answer("check", tmp_path / "new")["totals"]["payloads"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_of_two_backups_that_end_at_once_the_later_one_is_refused_and_the_other_is_whole(
    filled, serving, data, proxy, place, first
):
    caller = serving()
    if not first:
        run("backup", data, place)

    def meanwhile(request):
        # The first of them is about to make its manifest: the other one has not the chunk that this names.
        if request.startswith("PUT") and "backup.json" in request:
            proxy.answers = lambda _request: None
            caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[1]))
            backup(data, place)

    proxy.answers = meanwhile
    assert "another backup was made" in refusal("backup", data, place)
    assert answer("check", place)["totals"]["payloads"] == 3
    # One whose answer was lost is none of another run.
    left = iter([PAST])
    proxy.answers = lambda request: next(left, None) if request.startswith("PUT") and "backup.json" in request else None
    assert answer("backup", data, place)["ok"]
