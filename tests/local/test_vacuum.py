"""What the records take on the disk is given back to it."""

import sqlite3
from contextlib import closing

from kvbank.v1 import service_pb2 as pb
from memory_service.domain.limits import Limits
from tests.support.caller import stored_bytes
from tests.support.waiting import wait_until


def test_what_chunks_take_is_shown_and_given_back(caller, data):
    """Texts and vectors, no K-V: C15's case."""
    caller.create("v", layers=[], quota={"bytes": 3_000_000})
    before = caller.stub.GetStats(pb.GetStatsRequest())
    chunks = [caller.chunk(layers=[], text="a text of some length " * 40) for _ in range(2000)]
    caller.write_together(chunks, "v")
    full = caller.stub.GetStats(pb.GetStatsRequest())
    assert caller.usage("v").bytes == sum(stored_bytes(*each) for each in chunks)
    grown = full.database_bytes - before.database_bytes
    assert caller.usage("v").bytes / 2 < grown < 3 * caller.usage("v").bytes  # with the log
    ids = caller.ids_of_all("v")
    for begin in range(0, len(ids), 1000):
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="v", chunk_ids=ids[begin : begin + 1000]))
    freed = caller.stub.GetStats(pb.GetStatsRequest())
    assert freed.database_free_bytes > grown / 4
    done = caller.stub.Compact(pb.CompactRequest())
    assert done.database_bytes_before - done.database_bytes > grown / 2
    assert (data / "metadata.db").stat().st_size <= done.database_bytes
    assert caller.stub.GetStats(pb.GetStatsRequest()).database_free_bytes == 0
    assert caller.add() in caller.ids()


def test_much_that_is_free_is_given_back_without_being_asked(serving, data):
    caller = serving(limits=Limits(kept_pages=20, vacuum_s=0.1))
    caller.create("v", layers=[])
    caller.write_together((caller.chunk(layers=[], text="a" * 2000) for _ in range(500)), "v")
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="v"))
    free = "SELECT count(*) FROM contents"
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        wait_until(lambda: database.execute(free).fetchone() == (0,))
    wait_until(lambda: caller.stub.GetStats(pb.GetStatsRequest()).database_free_bytes < 20 * 4096)
    assert (data / "metadata.db").stat().st_size < 500 * 2000 / 2
