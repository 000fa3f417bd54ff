"""`kvbank stats` and `kvbank top`, and the arithmetic of the second."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import kvbank
from kvbank._cli import rates

Run = Callable[..., Any]
Make = Callable[..., kvbank.NewChunk]


def test_stats(
    run: Run,
    address: str,
    client: kvbank.Client,
    make_bank: Callable[..., str],
    make_chunk: Make,
    digests: dict[str, str],
) -> None:
    name = make_bank(capacity=kvbank.Capacity(chunks=321))
    client.write(name, make_chunk(0), **digests)
    answer = json.loads(run("stats", "--memory", address, "--json").stdout)
    assert answer["store_id"] == client.server_info().store_id
    (found,) = [each for each in answer["banks"] if each["bank"]["name"] == name]
    assert found["bank"]["usage"]["chunks"] == 1
    assert found["index"]["kind"] == "exact"
    assert "kvbank_chunks_written_total" in {sample["name"] for sample in answer["samples"]}
    shown = run("stats", "--memory", address).stdout
    for words in (answer["store_id"], name, "321 chunks", "free", "0 checksum failures"):
        assert words in shown


def test_compact_of_a_service_and_of_a_folder(
    run: Run,
    address: str,
    tmp_path: Path,
    kv: kvbank.KVSpec,
    embedding: kvbank.EmbeddingSpec,
    make_chunk: Make,
    digests: dict[str, str],
) -> None:
    answer = json.loads(run("compact", "--memory", address, "--json").stdout)
    assert answer["database_bytes"] > 0
    with kvbank.connect(tmp_path / "data") as client:
        client.create_bank("b", kv=kv, embedding=embedding)
        written = list(client.write_many("b", (make_chunk(i) for i in range(300)), **digests))
        client.delete_chunks("b", [each.chunk_id for each in written])
        free = client.stats().database_free_bytes
    answer = json.loads(run("compact", str(tmp_path / "data"), "--json").stdout)
    assert answer["database_bytes_before"] - answer["database_bytes"] >= free / 2 > 0
    assert "before" in run("compact", str(tmp_path / "data")).stdout
    refused = run("compact", str(tmp_path / "none"))
    assert (refused.returncode, "is no data folder" in refused.stderr) == (1, True)
    assert not (tmp_path / "none").exists()


def test_top_without_a_terminal_is_one_sample(run: Run, address: str, make_bank: Callable[..., str]) -> None:
    name = make_bank()
    answer = json.loads(run("top", "--memory", address, "--json", "--interval", "100ms").stdout)
    assert answer["seconds"] >= 0.1
    assert "GetStats" in {method["method"] for method in answer["methods"]}
    assert name in {bank["name"] for bank in answer["banks"]}
    shown = run("top", "--memory", address, "--interval", "0.1").stdout
    for words in ("GetStats", "p99 ms", name, "in flight"):
        assert words in shown


# So that its Ctrl-C becomes a signal.
_ON_THIS_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from kvbank.cli import main
main()
"""


@pytest.mark.parametrize("end", [pytest.param(b"q", marks=pytest.mark.slow), b"\x03"])
def test_top_is_live_until_it_is_told_to_end(address: str, end: bytes) -> None:
    """Run it on a terminal, and send Ctrl-C as the terminal does."""
    ours, its = pty.openpty()
    command = [sys.executable, "-c", _ON_THIS_TERMINAL, "top", "-m", address, "-i", "0.1"]
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True)
    os.close(its)
    try:
        seen = _read_until(ours, b"p99 ms")
        seen += _read_until(ours, b"p99 ms")  # a second picture: it goes on by itself
        os.write(ours, end)
        _read_until(ours, None)
        assert process.wait(60) == 0
        assert b"\x1b[3" not in seen, "NO_COLOR"
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read_until(terminal: int, wanted: bytes | None) -> bytes:
    """Return what the process printed, up to `wanted`, or to its end."""
    seen, end = b"", time.monotonic() + 60
    while wanted is None or wanted not in seen:
        assert time.monotonic() < end, seen[-2000:]
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # Linux says so when the other side has closed
                part = b""
            if not part:
                assert wanted is None, seen[-2000:]
                break
            seen += part
    return seen


def test_a_server_that_goes_away_is_one_line(run: Run, unused_port: int) -> None:
    for command in ("stats", "top"):
        ended = run(command, "--memory", f"127.0.0.1:{unused_port}")
        assert ended.returncode == 1
        assert ended.stderr.startswith("kvbank: UNAVAILABLE")
        assert ended.stderr.count("\n") == 1


# From two samples to rates


def _stats(start: int, **figures: float) -> kvbank.Stats:
    buckets = {"0.001": 0.0, "0.002": 0.0, "+Inf": 0.0} | {
        name.removeprefix("le_").replace("_", "."): value for name, value in figures.items() if name.startswith("le_")
    }
    samples = [
        kvbank.MetricSample("kvbank_request_seconds_bucket", {"method": "Retrieve", "code": "OK", "le": le}, value)
        for le, value in buckets.items()
    ]
    labels = {"method": "Retrieve", "code": "OK"}
    samples.append(kvbank.MetricSample("kvbank_request_seconds_count", labels, buckets["+Inf"]))
    samples.append(kvbank.MetricSample("kvbank_payload_sent_bytes_total", {"path": "stream"}, figures.get("sent", 0)))
    return kvbank.Stats("0", "s", datetime.fromtimestamp(start, UTC), 1, 2, (), tuple(samples))


def test_rates_are_the_difference() -> None:
    before = _stats(0, **{"le_0_001": 100, "le_0_002": 100, "le_+Inf": 100, "sent": 1000})
    after = _stats(0, **{"le_0_001": 150, "le_0_002": 200, "le_+Inf": 200, "sent": 3000})
    found = rates.between(before, after, 2.0)
    (method,) = found.methods
    assert method.per_second == 50
    assert method.p50_ms == pytest.approx(1.0)
    assert method.p99_ms == pytest.approx(1.98)
    assert found.sent_bytes_per_second == 1000


def test_a_server_that_started_again_counts_from_zero() -> None:
    before = _stats(0, **{"le_0_001": 100, "le_0_002": 100, "le_+Inf": 100})
    after = _stats(1, **{"le_0_001": 10, "le_0_002": 10, "le_+Inf": 10})
    assert rates.between(before, after, 1.0).methods[0].per_second == 10


def test_nothing_happened() -> None:
    quiet = _stats(0)
    (method,) = rates.between(quiet, quiet, 1.0).methods
    assert (method.per_second, method.p50_ms, method.p99_ms) == (0, None, None)


def test_slower_than_the_largest_bucket() -> None:
    found = rates.between(_stats(0), _stats(0, **{"le_+Inf": 4}), 1.0)
    assert found.methods[0].p99_ms == 2.0


@pytest.mark.parametrize("interval", ["0", "0.05s", "2h", "soon", "-1"])
def test_an_interval_that_is_none_is_wrong_use(address: str, run: Callable[..., Any], interval: str) -> None:
    ended = run("top", "--memory", address, "--once", f"--interval={interval}")
    assert ended.returncode == 2
    assert "--interval" in ended.stderr
