"""At a clean stop callers are told that the service is not there, and nothing else."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service.domain.errors import ServiceError
from tests.support.waiting import wait_until

CALLERS = 24


def codes_at_a_stop(serving: Any, connect: Callable[..., Any], call: Callable[[Any], Any]) -> Counter[str]:
    """Count the codes that end many callers, each with a connection of its own, when the service stops."""
    ends: Counter[str] = Counter()
    done = [0] * CALLERS

    def ask(number: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with connect(serving.server.address, 1000 * (number + 1), options) as caller:
            try:
                while True:
                    call(caller)
                    done[number] += 1
            except grpc.RpcError as error:
                ends[error.code().name] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(done))
    serving.server.stop()
    for thread in threads:
        thread.join()
    return ends


@pytest.mark.parametrize(
    "call",
    [
        lambda caller: caller.retrieve(top_k=3),
        lambda caller: caller.stub.GetBank(pb.GetBankRequest(name="b")),
        lambda caller: caller.write(caller.chunk()),
    ],
    ids=["retrieve", "get_bank", "write"],
)
def test_who_meets_a_stop_is_told_that_it_is_one(serving: Any, connect: Any, call: Callable[[Any], Any]) -> None:
    caller = serving()
    caller.create()
    caller.add()
    ends = codes_at_a_stop(serving, connect, call)
    # gRPC's core cancels what comes between its stop and its farewell to the connection, some microseconds on a quiet
    # machine. All that it had taken before, most of the calls, used to end so.
    assert ends["UNAVAILABLE"] >= CALLERS - CALLERS // 4
    assert ends.keys() <= {"UNAVAILABLE", "CANCELLED"}


def running(caller: Any, method: str) -> bool:
    samples = caller.stub.GetStats(pb.GetStatsRequest()).samples
    return any(s.value for s in samples if s.name == "kvbank_requests_running" and s.labels["method"] == method)


def test_a_call_that_outlasts_the_grace_time_is_told(serving: Any, refused: Any, frames: Any) -> None:
    caller = serving(grace=0.1)
    caller.create()
    over, sent = threading.Event(), threading.Event()
    chunk, data = caller.chunk()

    def half() -> Iterator[Any]:
        yield next(iter(frames(chunk, data)))
        sent.set()
        over.wait()

    call = caller.stub.WriteChunks(half())
    assert sent.wait(30)
    wait_until(lambda: running(caller, "WriteChunks"))
    began = time.monotonic()
    serving.server.stop()
    assert time.monotonic() - began < 30, "it waits for nobody for ever"
    with refused("NOT_SERVING", grpc.StatusCode.UNAVAILABLE):
        list(call)
    over.set()


def test_what_runs_is_finished(serving: Any, payload_path: Callable[[int], Path]) -> None:
    """Answers that were begun before the stop are finished: 8.5 MiB of this one are taken after it."""
    caller = serving(grace=60)
    caller.create()
    chunk, data = caller.chunk(m=65_536, original_length=65_536, token_ids=())
    (ack,) = caller.stub.WriteChunks(caller.frames(chunk, data))
    answers = caller.stub.FetchChunks(
        pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[ack.chunk_id])
    )
    assert next(answers).HasField("header")
    stopping = threading.Thread(target=serving.server.stop)
    stopping.start()
    received = b"".join(frame.data for frame in answers)
    stopping.join()
    assert received == data


def test_who_still_works_when_the_storage_is_closed_is_told(serving: Any) -> None:
    """Threads that were not told would never end, and neither would the process."""
    serving().create()
    banks = serving.server.banks
    serving.stop()
    told = []

    def give_back() -> None:
        with pytest.raises(ServiceError) as refusal:
            banks.compact()
        told.append(refusal.value.reason)

    worker = threading.Thread(target=give_back, daemon=True)
    worker.start()
    worker.join(30)
    assert told == ["NOT_SERVING"]
