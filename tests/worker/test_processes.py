"""Two worker processes over one bank at the same time."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from tests.worker.tiny import bank
from tests.worker.worker_process import worker


def say(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def hear(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the worker ended early"
    return line.strip()


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_two_workers_share_a_bank(tmp_path: Path, seconds: int) -> None:
    """Chunks that either worker was told are stored are there for both, byte for byte; chunks and counts add up."""
    name = bank()
    with LocalServer(tmp_path) as server, kvbank.connect(server.address) as client:
        workers = [worker("share", server.address, name, number, seconds) for number in (1, 2)]
        try:
            for process in workers:
                assert hear(process) == "ready"
            for process in workers:
                say(process, "go")
            written = [json.loads(hear(process)) for process in workers]
            everything = [start for w in written for start in w["wrote"]]
            assert all(w["acknowledged"] == len(w["wrote"]) > 1 for w in written)
            for process in workers:
                say(process, json.dumps(everything[:: max(1, len(everything) // 2000)]))
            checked = [json.loads(hear(process)) for process in workers]
            for process in workers:
                assert process.wait(60) == 0
        finally:
            for process in workers:
                process.kill()
                process.wait()
                process.stdin.close()  # type: ignore[union-attr]
                process.stdout.close()  # type: ignore[union-attr]
        assert [c["wrong"] for c in checked] == [[], []]
        stored = list(client.list_chunks(name))
        assert sorted(c.start for c in stored) == sorted(everything)
        assert len({c.chunk_id for c in stored}) == len(everything) == client.get_bank(name).usage.chunks_written
        assert sum(c.retrieval_count for c in stored) == sum(c["recalls"] for c in checked)
