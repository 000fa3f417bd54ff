"""What happens to chunks is recorded where the operator asks for that, and the service never suffers from it."""

import gzip
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbank.commands import application
from kvbank.files import traces
from kvbank.v1 import service_pb2 as pb
from memory_service.domain.errors import StartError
from memory_service.observe.recording import Recorder
from tests.support import command
from tests.support.caller import AXES, Caller, lasting
from tests.support.clocks import HOUR, SECOND, Hands
from tests.support.waiting import wait_until

Serving = Callable[..., Caller]


def events(path: Path) -> list[Any]:
    """Return what a trace says, without times, and without the beginnings of the service."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    times = [each.pop("t") for each in found]
    assert times == sorted(times)
    assert abs(times[-1] / 1000 - time.time()) < 300
    return [each for each in found if "kvbank_trace" not in each]


def test_what_is_written_retrieved_and_gone_is_in_the_trace(serving: Serving, tmp_path: Path) -> None:
    path, hands = tmp_path / "trace.jsonl", Hands()
    caller = serving(record=str(path), clock=hands.clock())
    caller.create("c", capacity={"chunks": 3}, policy={"kind": 4, "target": 100})
    first, second, third = (caller.add(axis, bank="c", m=m) for axis, m in zip(AXES, (3, 4, 5), strict=False))
    hands.go_on(SECOND)
    caller.retrieve(AXES[0], banks=["c"], top_k=1)
    caller.retrieve(AXES[1], banks=["c"], top_k=1, skip_count=True)
    caller.retrieve((*AXES[2], *AXES[0]), banks=["c"], top_k=1)
    fourth = caller.add(AXES[3], bank="c")  # the second goes: what is not counted is not used
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="c", chunk_ids=[third]))
    brief = caller.add(AXES[1], bank="c", expiry=lasting(60 * SECOND))
    used = caller.usage("c").bytes
    hands.go_on(HOUR)
    wait_until(lambda: caller.usage("c").chunks_expired == 1)
    caller.create("d", layers=[])
    other = caller.add(AXES[0], bank="d", layers=[])
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="d"))
    serving.stop()  # type: ignore[attr-defined]
    found = events(path)
    assert {each["write"]: each["tokens"] for each in found if "write" in each} == {
        **{first: 3, second: 4, third: 5, fourth: 3, brief: 3},
        other: 3,
    }
    assert sum(each["bytes"] for each in found if each.get("write") in (first, fourth, brief)) == used
    assert [each for each in found if "write" not in each] == [
        {"bank": "c", "retrieve": [[first]]},
        {"bank": "c", "retrieve": [[third], [first]]},
        {"bank": "c", "gone": [second], "why": "evicted"},
        {"bank": "c", "gone": [third], "why": "deleted"},
        {"bank": "c", "gone": [brief], "why": "expired"},
        {"bank": "d", "dropped": True},
    ]
    assert path.stat().st_mode & 0o777 == 0o600
    summed = json.loads(command.run(application(), "bank", "trace", path, "--json").stdout)
    [c, d] = summed["banks"]
    assert (c["written"], c["tokens"], c["retrievals"], c["found"], c["found_chunks"]) == (5, 18, 2, 3, 2)
    assert c["gone"] == {"evicted": 1, "deleted": 1, "expired": 1}
    assert (d["bank"], d["written"], d["gone"]) == ("d", 1, {"bank deleted": 1})


def test_a_retrieval_of_several_banks_and_a_repeated_one_are_recorded_once(serving: Serving, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    caller = serving(record=str(path))
    ids = {}
    for name in ("a", "b"):
        caller.create(name)
        ids[name] = caller.add(AXES[0], bank=name)
    for _ in range(2):
        caller.retrieve((*AXES[0], *AXES[1]), banks=["b", "a"], top_k=2, min_score=0.5, request_id=b"x" * 16)
    serving.stop()  # type: ignore[attr-defined]
    found = [each for each in events(path) if "retrieve" in each]
    assert sorted((each["bank"], each["retrieve"]) for each in found) == [("a", [[ids["a"]]]), ("b", [[ids["b"]]])]


def test_a_restart_goes_on_in_the_same_file_behind_a_line_that_was_cut_off(serving: Serving, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    caller = serving(record=str(path))
    caller.create()
    first = caller.add()
    serving.stop()  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes() + b'{"t":1,"bank":"b","wri')
    assert [each.chunk for each in traces.read(path) if isinstance(each, traces.Wrote)] == [first]
    second = serving(first_key=5, record=str(path)).add()
    serving.stop()  # type: ignore[attr-defined]
    found = list(traces.read(path))
    assert [each.chunk for each in found if isinstance(each, traces.Wrote)] == [first, second]
    begun = [each for each in found if isinstance(each, traces.Begun)]
    assert len(begun) == 2
    assert begun[0].store == begun[1].store


def test_a_full_disk_ends_the_recording_with_one_warning_and_not_the_service(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        caller = serving(record="/dev/full")
        caller.create()
        written = [caller.add(AXES[0]) for _ in range(5)]
        hits = caller.retrieve(AXES[0])[0].queries[0].hits
        assert {hit.chunk_id for hit in hits} == set(written)
        serving.stop()  # type: ignore[attr-defined]
    said = [each.message for each in caplog.records if "recording" in each.message]
    assert said == ["the recording to /dev/full ends: No space left on device"]


def test_the_recording_leaves_the_room_that_is_to_stay_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, recorder = tmp_path / "trace.jsonl", Recorder()
    with caplog.at_level(logging.WARNING):
        recorder.begin(path, "store", min_free=1 << 60)
        recorder.end()
    assert path.read_bytes() == b""
    assert "is to be left free" in caplog.text


def test_a_trace_that_was_emptied_begins_anew(tmp_path: Path) -> None:
    """Test what logrotate does with `copytruncate`, while the service records on."""
    path, recorder = tmp_path / "trace.jsonl", Recorder()
    recorder.begin(path, "store", 0)
    recorder.gone("b", [1], "deleted")
    wait_until(lambda: path.read_bytes().count(b"\n") == 2)
    os.truncate(path, 0)
    recorder.gone("b", [2], "deleted")
    recorder.end()
    begun, gone = traces.read(path)
    assert isinstance(begun, traces.Begun)
    assert begun.store == "store"
    assert isinstance(gone, traces.Gone)
    assert gone.chunks == (2,)
    Recorder().begin(path, "store", 0)


def test_an_eviction_of_very_many_chunks_can_be_read(tmp_path: Path) -> None:
    path, recorder, many = tmp_path / "trace.jsonl", Recorder(most_waiting=1 << 24), range(10**9, 10**9 + 1_700_000)
    recorder.begin(path, "store", 0)
    recorder.gone("b", many, "evicted")
    recorder.wrote("b", 1, 2, 3)
    recorder.end()
    found = list(traces.read(path))
    assert sum(len(each.chunks) for each in found if isinstance(each, traces.Gone)) == len(many)
    assert isinstance(found[-1], traces.Wrote)
    with path.open("ab") as file:
        file.write(traces.line(traces.Gone(1, "b", tuple(many), "evicted")))
    with pytest.raises(traces.TraceError, match="no line of a trace"):
        list(traces.read(path))


def test_what_is_no_trace_and_what_another_service_records_to_is_refused(tmp_path: Path) -> None:
    own, taken = tmp_path / "notes.txt", tmp_path / "taken.jsonl"
    own.write_text("dear diary\n")
    holder = Recorder()
    holder.begin(taken, "store", 0)
    try:
        for path, why in ((own, "no trace"), (taken, "another"), (tmp_path, "directory"), (own / "x", "directory")):
            with pytest.raises(StartError, match=why):
                Recorder().begin(path, "store", 0)
    finally:
        holder.end()
    assert own.read_text() == "dear diary\n"
    Recorder().begin(taken, "store", 0)


def test_what_a_slow_disk_does_not_take_is_counted_as_lost(tmp_path: Path) -> None:
    path, recorder = tmp_path / "trace.jsonl", Recorder(most_waiting=8)
    recorder.begin(path, "store", 0)
    for number in range(3000):
        recorder.gone("b", [number] * 4, "deleted")
    recorder.end()
    found = list(traces.read(path))
    written = sum(isinstance(each, traces.Gone) for each in found)
    assert written + sum(each.events for each in found if isinstance(each, traces.Lost)) == 3000
    recorder.gone("b", [1], "deleted")  # after the end it does nothing


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense\n",
        '{"kvbank_trace":2,"t":1,"store":""}\n',
        '{"kvbank_trace":1,"t":1,"store":""}\n{"t":1,"bank":"b","write":"x"}\n{"t":2,"lost":1}\n',
        '{"kvbank_trace":1,"t":1,"store":""}\n{"t":1,"bank":"b","retrieve":[[1,"2"]]}\n',
        '{"kvbank_trace":1,"t":1,"store":""}\n' + "[" * 100_000 + "\n",
    ],
)
def test_a_file_that_is_no_trace_is_said_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(text)
    ended = command.run(application(), "bank", "trace", path)
    assert ended.exit_code == 1
    assert ended.stderr.startswith("kvbank: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


def test_banks_of_one_name_in_several_stores_are_summed_up_apart(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    told = [traces.Wrote(2, "b", 3, 4, 5), traces.Retrieved(6, "b", ((3,),))]
    path.write_bytes(b"".join(map(traces.line, [traces.Begun(1, "s"), *told, traces.Begun(7, "another"), *told])))
    banks = json.loads(command.run(application(), "bank", "trace", path, "--json").stdout)["banks"]
    assert [(each["bank"], each["written"], each["found_chunks"]) for each in banks] == [("b", 1, 1)] * 2


def test_a_packed_trace_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    told = [traces.Begun(1, "s"), traces.Wrote(2, "b", 3, 4, 5), traces.Retrieved(6, "b", ((3, 1), (2,)))]
    path.write_bytes(gzip.compress(b"".join(map(traces.line, told))))
    assert list(traces.read(path)) == told
    path.write_bytes(path.read_bytes()[:-12])
    assert "kvbank: cannot read" in command.run(application(), "bank", "trace", path).stderr
