"""The memory of the server stays flat whatever passes through it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbank.v1 import service_pb2 as pb
from tests.support.caller import BIG, MIB


def resident(process: int) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def passed_through(data: Path, connect: Callable[..., Any], frames: Callable[..., Any], total: int) -> int:
    """Write `total` bytes to a server of its own, in chunks of 8.5 MiB, and fetch each; by how much it grew since the
    first 100 MiB."""
    ready = data.with_suffix(".ready")
    command = [sys.executable, "-m", "memory_service", "--data", str(data), "--listen", "127.0.0.1:0"]
    command += ["--ready-file", str(ready), "--durability", "os"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not ready.exists():
                assert process.poll() is None
            with connect(ready.read_text().strip()) as caller:
                caller.create(capacity={"chunks": 10})
                chunk, data_ = caller.chunk(**BIG)
                before = done = 0
                while done < total:
                    chunk.idempotency_key = done.to_bytes(16, "big")
                    (ack,) = caller.stub.WriteChunks(frames(chunk, data_, step=MIB))
                    for _ in caller.stub.FetchChunks(
                        pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[ack.chunk_id])
                    ):
                        pass
                    done += len(data_)
                    if not before and done > 100 * MIB:
                        before = resident(process.pid)
                return resident(process.pid) - before
        finally:
            process.terminate()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_memory_of_the_server_stays_flat(
    tmp_path: Path, connect: Callable[..., Any], frames: Callable[..., Any]
) -> None:
    assert passed_through(tmp_path / "data", connect, frames, 500 * MIB) < 64 * MIB
