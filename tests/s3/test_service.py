"""Services on a database and a bucket, called at the wire, while the bucket fails, loses objects, or is another one."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.domain.errors import StartError
from memory_service.domain.limits import STANDARD, Limits, Pauses
from memory_service.storage.s3.layout import chunk_of, key
from tests.support import postgres
from tests.support.bucket import CUT, NAME, PAST, Faulty
from tests.support.caller import Caller
from tests.support.refusals import Refusals
from tests.support.waiting import wait_until

LIMITS = replace(STANDARD, objects=replace(STANDARD.objects, patience_s=0.5, first_pause_s=0.001, longest_pause_s=0.01))
# Nothing is written while a service with these sweeps: it takes what has no row yet for an orphan.
SWEEPING = replace(LIMITS, objects=replace(LIMITS.objects, orphan_s=0, sweep_s=0.05))


@pytest.fixture
def serve(bucket, proxy: Faulty, tmp_path: Path, monkeypatch) -> Iterator[Callable[..., Caller]]:
    """Start a service (stopping those before, unless it is `beside` them) whose bucket is behind the proxy, and call
    it."""
    if why := postgres.missing():
        pytest.skip(f"no PostgreSQL here: {why}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    running: list[tuple[LocalServer, Caller]] = []

    def stop() -> None:
        while running:
            server, caller = running.pop()
            caller.channel.close()
            server.stop()

    with postgres.database() as url:

        def start(first_key: int = 1, *, beside: bool = False, limits: Limits = LIMITS, **settings: Any) -> Caller:
            if not beside:
                stop()
            given = {"data": url, "objects": str(bucket.location), "cache": str(tmp_path / "cache"), "durability": "os"}
            server = LocalServer(**(given | settings), limits=limits)
            running.append((server, Caller(server.address, first_key)))
            return running[-1][1]

        yield start
        stop()


def keys(bucket) -> list[str]:
    return [item.key for page in bucket.pages("chunks") for item in page]


def test_a_bucket_that_fails_costs_answers_and_no_chunk(bucket, proxy, serve):
    refused = Refusals()
    caller = serve()
    caller.create()
    chunk, data = caller.chunk()
    proxy.faults = [(503, "SlowDown"), PAST]
    (ack,) = caller.write((chunk, data))
    assert [chunk_of(name)[1] for name in keys(bucket)] == [ack.chunk_id]
    proxy.faults = [CUT, (500, "InternalError")]
    assert caller.retrieve()[1] == {ack.chunk_id: data}
    # Out of the cache, and with the bucket gone.
    proxy.answers = lambda _request: (503, "SlowDown")
    assert caller.retrieve()[1] == {ack.chunk_id: data}
    for fault in ((503, "SlowDown"), (403, "AccessDenied"), (404, "NoSuchBucket")):
        proxy.answers = lambda _request, fault=fault: fault
        with refused("STORAGE_ERROR", StatusCode.UNAVAILABLE):
            caller.fetch(ack.chunk_id, layers=[1])
        with refused("STORAGE_ERROR", StatusCode.UNAVAILABLE):
            caller.add()
    proxy.answers = lambda _request: None
    assert caller.fetch(ack.chunk_id) == {ack.chunk_id: data}
    assert caller.ids() == [ack.chunk_id]


@pytest.mark.slow
def test_a_stop_waits_for_no_object_that_a_bucket_does_not_delete(bucket, proxy, serve):
    caller = serve(limits=replace(LIMITS, objects=replace(LIMITS.objects, patience_s=3600)))
    caller.create()
    ids = [caller.add() for _ in range(3)]
    proxy.answers = lambda request: (503, "SlowDown") if request.startswith(("DELETE", "POST")) else None
    for chunk_id in ids:
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[chunk_id]))
    asked = len(proxy.seen)
    wait_until(lambda: len(proxy.seen) > asked)
    caller = serve()
    # They are orphans from here on.
    assert len(keys(bucket)) == len(ids)
    assert list(caller.retrieve()[1]) == []


@pytest.mark.slow
def test_a_stop_waits_for_no_bank_whose_objects_a_bucket_does_not_delete(bucket, proxy, serve):
    begun = threading.Event()
    # Deleted banks are cleared by what recurs alone, since the thread of what is done once waits.
    caller = serve(
        limits=replace(LIMITS, objects=replace(LIMITS.objects, patience_s=3600), cleared_s=0.05, expiry_s=0.05),
        pauses=Pauses(at={"clearing step": begun.set}),
    )
    caller.create()
    caller.create("other")
    one, _ = caller.add(), caller.add(bank="other")
    proxy.answers = lambda request: (503, "SlowDown") if request.startswith(("DELETE", "POST")) else None
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[one]))
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="other"))
    assert begun.wait(60)
    serve()
    assert len(keys(bucket)) == 2


@pytest.mark.slow
def test_an_object_that_is_lost_or_changed_takes_its_chunk_out_of_service(bucket, serve):
    refused = Refusals()
    caller = serve()
    caller.create()
    _, changed, kept = (caller.add(vector) for vector in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)))
    first, second, _ = keys(bucket)
    bucket.delete([first])
    whole = bytes(bucket.read(second, 0, 1 << 20).data)
    bucket.put(second, [whole[:-1] + bytes([whole[-1] ^ 1])])
    for vector in ((1, 0, 0, 0), (0, 1, 0, 0)):
        with refused("CHECKSUM_MISMATCH", StatusCode.DATA_LOSS):
            caller.retrieve(vector, top_k=1)
    assert caller.ids() == [kept]
    assert set(caller.retrieve()[1]) == {kept}
    assert {chunk_of(name)[1] for name in keys(bucket)} <= {changed, kept}


@pytest.mark.slow
def test_what_a_chunk_leaves_goes_with_it(bucket, serve):
    caller = serve()
    caller.create()
    gone, kept = caller.add(), caller.add()
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[gone]))
    # What is refused, or was written before, leaves no object either.
    chunk = caller.chunk()
    ids = {caller.write(chunk)[0].chunk_id for _ in range(3)}
    assert len(ids) == 1
    caller = serve(first_key=50)
    assert {chunk_of(name)[1] for name in keys(bucket)} == {kept, *ids}


@pytest.mark.slow
def test_a_bucket_of_another_store_is_one_line_at_the_start(bucket, serve):
    caller = serve()
    caller.create()
    caller.add()
    with pytest.raises(StartError, match="has no payloads of this store; is it another bucket or prefix than before"):
        serve(objects=f"s3://{NAME}/elsewhere")
    with pytest.raises(StartError, match="the bucket of s3://no-such-bucket is not there"):
        serve(objects="s3://no-such-bucket")
    with postgres.database(empty=True) as other, pytest.raises(StartError, match="has the payloads of another store"):
        serve(data=other)


@pytest.mark.slow
def test_a_service_sweeps_its_bucket(bucket, serve):
    refused = Refusals()
    caller = serve()
    caller.create()
    _, damaged, kept = (caller.add(vector) for vector in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)))
    first, second, third = keys(bucket)
    bucket.put_new(key(chunk_of(first)[0], 1000), [b"of a write that was cut off"])
    bucket.delete([first])
    bucket.put(second, [b"damaged"])
    with refused("CHECKSUM_MISMATCH", StatusCode.DATA_LOSS):
        caller.fetch(damaged)
    caller = serve(first_key=50, limits=SWEEPING)
    wait_until(lambda: caller.ids() == [kept])
    # What is out of service stays for a person to look at, until its bank is deleted.
    wait_until(lambda: keys(bucket) == [second, third])
    assert caller.usage().chunks_quarantined == 2
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="b"))
    wait_until(lambda: not keys(bucket))


@pytest.mark.slow
def test_what_one_service_removes_leaves_the_cache_of_another(bucket, serve, tmp_path):
    one = serve()
    one.create()
    gone, kept = one.add(), one.add()
    other = serve(first_key=50, beside=True, cache=str(tmp_path / "other"))
    assert set(other.retrieve()[1]) == {gone, kept}

    def cached() -> set[int]:
        return {int(path.name.split(".")[0]) for path in (tmp_path / "other").rglob("payloads/*/*.*")}

    assert cached() == {gone, kept}
    assert other.sample("kvbank_objects_opened_total", source="bucket") == 2
    one.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[gone]))
    assert set(other.retrieve()[1]) == {kept}
    assert cached() == {kept}
    assert other.sample("kvbank_objects_opened_total", source="cache") == 1


_WITHOUT = """
import sys
from memory_service.domain.errors import StartError
from memory_service.observe.metrics import Metrics
from memory_service.settings import load
from memory_service.storage.opening import open_engine

for package in ("obstore", "psycopg"):
    sys.modules[package] = None
    try:
        open_engine(load({"data": "postgresql://host/name", "objects": "s3://bucket"}), Metrics(), None)
    except StartError as error:
        print(error)
    del sys.modules[package]
"""


@pytest.mark.slow
def test_a_package_that_is_missing_is_named_with_what_brings_it():
    said = subprocess.run(
        [sys.executable, "-c", _WITHOUT], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert said.splitlines() == [
        "data in a database need obstore: pip install 'kvbank[s3]'",
        "data in a database need psycopg: pip install 'kvbank[postgres]'",
    ]
