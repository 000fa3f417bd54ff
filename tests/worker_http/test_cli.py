"""The command `kvbank worker` refuses what is unsafe before it loads a model, and serves until it is told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from memory_service.api.embedded import LocalServer
from tests.support import command
from tests.worker_http.conftest import Running
from tests.worker_http.test_chat import ask

SERVING = ("--window", "128", "--listen", "127.0.0.1:0")


def refused(*words: object) -> str:
    ended = command.run(command.application(), "worker", *words)
    assert ended.exit_code == 2, ended
    return ended.stderr


def test_what_would_open_a_store_to_others_is_refused(tmp_path: Path) -> None:
    assert "give the worker a certificate" in refused("--listen", "0.0.0.0:0")
    assert "is a unix socket" in refused("--memory", "unix:/tmp/socket")
    assert "kvbank serve --data" in refused("--memory", tmp_path)
    assert "give both" in refused("--tls-cert", tmp_path)
    assert "there is no file" in refused("--tls-cert", tmp_path / "a", "--tls-key", tmp_path / "b")
    assert "is not HOST:PORT" in refused("--listen", "8000")


def test_an_address_that_is_taken_is_told(worker: Running) -> None:
    ended = command.run(command.application(), "worker", "--listen", f"127.0.0.1:{worker.port}")
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
    assert "cannot listen on" in ended.stderr


@pytest.mark.slow
def test_a_worker_serves_until_it_is_told_to_stop(model_folder: Path, tmp_path: Path) -> None:
    """Start a worker with a key in its environment, which must not go with the calls of others."""
    ready = tmp_path / "ready"
    with LocalServer(tmp_path / "data", listen="127.0.0.1:0") as service:
        words = [sys.executable, "-c", "from kvbank.cli import main; main()", "worker", "--name", "tiny"]
        words += ["--model", str(model_folder), "--memory", service.address, "--ready-file", str(ready)]
        environment = {**os.environ, "KVBANK_API_KEY": "kvb_of_the_worker"}
        with subprocess.Popen([*words, *SERVING], env=environment, stderr=subprocess.PIPE) as process:
            try:
                serves_and_stops(process, ready)
            finally:
                process.kill()


def serves_and_stops(process: "subprocess.Popen[bytes]", ready: Path) -> None:
    assert process.stderr
    deadline = time.monotonic() + 120
    while not ready.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    url = f"http://{ready.read_text().strip()}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert ask(client, extra_headers={"X-Kvbank-Session": "cli"}).choices[0].message.content
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert b"Traceback" not in process.stderr.read()
