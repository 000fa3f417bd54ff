"""Where the index of a bank comes from: snapshots, the records, and what changes meanwhile."""

import logging
import multiprocessing
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import IndexLimits, Limits, Pauses
from memory_service.storage.local.records import chunk_rows
from tests.support.caller import Caller
from tests.support.searching import best, fill, ids_of, normal, stats
from tests.support.waiting import wait_until


def loads(caplog):
    """Return (from snapshots, from records) for each time that an index was loaded."""
    pattern = re.compile(r"(\d+) vectors from snapshots, (\d+) from records")
    return [tuple(map(int, found.groups())) for text in caplog.messages if (found := pattern.search(text))]


FEW = 200
SHORT_TAILS = Limits(index=IndexLimits(tail_rows=FEW))
# The rows of a tail that is worth a file are 512.
LONGER_TAILS = Limits(index=IndexLimits(tail_rows=520))


def serve(data, address):
    server = LocalServer(data, durability="os", limits=SHORT_TAILS)
    address.put(server.address)
    threading.Event().wait()


def test_a_killed_server_comes_back_with_its_snapshots(data, connect, serving, caplog):
    context = multiprocessing.get_context("spawn")
    address = context.SimpleQueue()
    process = context.Process(target=serve, args=(data, address), daemon=True)
    process.start()
    vectors = normal(FEW + 100)
    with connect(address.get()) as caller:
        caller.create("v", layers=[])
        ids = fill(caller, vectors[:10])
        ids_of(caller, banks=["v"])  # loads the index, which then follows the writes
        ids += fill(caller, vectors[10:])
        wait_until(lambda: list((data / "indexes").glob("*/*.segment")))
        process.kill()
        process.join()
    caplog.set_level(logging.INFO)
    caller = serving(limits=SHORT_TAILS)
    query = normal(1, 9)[0]
    assert ids_of(caller, query, banks=["v"]) == [best(vectors, ids, query)]
    assert loads(caplog) == [(FEW, 100)]


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Make the folder of `stopped`, once; return it with the vectors and ids of its bank."""
    folder = tmp_path_factory.mktemp("left") / "data"
    with LocalServer(folder, durability="os", limits=LONGER_TAILS) as server:
        caller = Caller(server.address)
        caller.create("v", layers=[])
        vectors = normal(1555)
        ids = fill(caller, vectors[:100])
        ids_of(caller, banks=["v"])
        ids += fill(caller, vectors[100:])
        caller.channel.close()
    return folder, vectors, ids


@pytest.fixture
def stopped(left, data):
    """Vectors and ids of a bank "v" whose server stopped: some in sealed segments, the rest in the tail's file."""
    folder, vectors, ids = left
    shutil.copytree(folder, data)
    return vectors, ids


def test_a_stopped_server_reads_no_embedding_again(serving, stopped, caplog):
    vectors, ids = stopped
    caplog.set_level(logging.INFO)
    query = normal(1, 9)[0]
    assert ids_of(serving(limits=LONGER_TAILS), query, banks=["v"]) == [best(vectors, ids, query)]
    assert loads(caplog) == [(1555, 0)]


@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_a_damaged_snapshot_is_rebuilt_and_said(serving, stopped, data, caplog, harm):
    vectors, ids = stopped
    paths = list((data / "indexes").glob("*/*.segment"))
    assert len(paths) == 3
    for path in paths[:2]:
        if harm == "remove":
            path.unlink()
            continue
        raw = bytearray(path.read_bytes())
        raw[-100] ^= 1
        path.write_bytes(raw)
    caplog.set_level(logging.INFO)
    query = normal(1, 9)[0]
    assert ids_of(serving(limits=LONGER_TAILS), query, banks=["v"]) == [best(vectors, ids, query)]
    ((kept, read),) = loads(caplog)
    assert kept + read == 1555
    assert 0 < kept < 1555
    assert sum("is not used: its checksum is wrong" in text for text in caplog.messages) == (2 if harm == "flip" else 0)


def test_a_deleted_bank_leaves_no_snapshot(serving, stopped, data):
    caller = serving()
    ids_of(caller, banks=["v"])
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="v"))
    wait_until(lambda: not list((data / "indexes").glob("*")))
    serving.stop()
    (data / "indexes" / "of_a_bank_that_is_gone").mkdir(parents=True)
    serving()
    wait_until(lambda: not list((data / "indexes").glob("*")))


def test_what_changes_while_an_index_is_loaded_is_not_missed(serving):
    """Loading holds up nothing but the search that wants the index."""
    loading, go_on = threading.Event(), threading.Event()

    def wait():
        loading.set()
        assert go_on.wait(60)

    vectors = serving(pauses=Pauses(at={"index loaded": wait}))
    vectors.create("v", layers=[])
    data = normal(40)
    ids = fill(vectors, data[:30])
    query = normal(1, 9)[0]
    with ThreadPoolExecutor(1) as thread:
        searching = thread.submit(ids_of, vectors, query, banks=["v"])
        try:
            assert loading.wait(60)
            ids += fill(vectors, data[30:])
            vectors.stub.DeleteChunks(pb.DeleteChunksRequest(bank="v", chunk_ids=ids[:10]))
        finally:
            go_on.set()
        expected = [best(data[10:], ids[10:], query)]
        assert searching.result() == expected
    assert ids_of(vectors, query, banks=["v"]) == expected


def test_an_index_that_missed_a_change_is_loaded_anew(serving):
    at = {}
    vectors = serving(pauses=Pauses(at=at))
    vectors.create("v", layers=[])
    ids = fill(vectors, normal(20))
    ids_of(vectors, banks=["v"])
    at["index told"] = lambda: 1 / 0
    vectors.stub.DeleteChunks(pb.DeleteChunksRequest(bank="v", chunk_ids=ids[:5]))
    at.clear()
    assert not stats(vectors).loaded
    assert sorted(ids_of(vectors, banks=["v"], top_k=100)[0]) == ids[5:]


@pytest.mark.parametrize("count", [0, 1, 1 << 16, (1 << 16) + 1, (1 << 17) + 3])
def test_all_ids_of_a_bank_are_read_and_none_of_another(count: int) -> None:
    with sa.create_engine("sqlite://").connect() as connection:
        connection.exec_driver_sql("CREATE TABLE chunks (chunk_id INTEGER PRIMARY KEY, bank_id INTEGER)")
        connection.exec_driver_sql(
            "INSERT INTO chunks WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " SELECT 2 * i + 1, 1 + (i >= ?) FROM n",
            (count, count),
        )
        assert chunk_rows.ids(connection, 1).tolist() == list(range(1, 2 * count, 2))
        assert chunk_rows.ids(connection, 2).tolist() == [2 * count + 1]
