"""Two worker processes over one bank at the same time."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from tests.worker.tiny import bank
from tests.worker.worker_process import compared, open_memory, worker, write_for


def say(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def hear(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the worker ended early"
    return line.strip()


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "most"), [(1, 40), (60, 2000)])
def test_two_workers_share_a_bank(tmp_path: Path, seconds: int, most: int) -> None:
    """Chunks that either worker was told are stored are there for both, byte for byte; chunks and counts add up. One of
    the workers is this process."""
    name = bank()
    with LocalServer(tmp_path) as server, kvbank.connect(server.address) as client:
        process, here = (
            worker("share", server.address, name, 1, seconds),
            open_memory(server.address, name, strict=True),
        )
        here.open()
        try:
            assert hear(process) == "ready"
            say(process, "go")
            own = write_for(here, 2, seconds)
            there = json.loads(hear(process))
            everything = [*there["wrote"], *own]
            assert there["acknowledged"] == len(there["wrote"]) > 1
            assert here.stats.written == len(own) > 1
            some = everything[:: max(1, len(everything) // most)]
            say(process, json.dumps(some))
            assert compared(here, some) == []
            found = json.loads(hear(process))
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            process.stdin.close()  # type: ignore[union-attr]
            process.stdout.close()  # type: ignore[union-attr]
        assert found["wrong"] == []
        stored = list(client.list_chunks(name))
        assert sorted(c.start for c in stored) == sorted(everything)
        assert len({c.chunk_id for c in stored}) == len(everything) == client.get_bank(name).usage.chunks_written
        assert sum(c.retrieval_count for c in stored) == found["recalls"] + here.stats.recalls
