"""The command line: output for people and machines, exit codes, missing extras."""

import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NamedTuple

import pytest

import kvbank
from kvbank import cli


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the console script's function with these arguments."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["kvbank", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return call


def assert_fails_in_one_line(ended: Ended, *words: str) -> None:
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("kvbank: ")
    assert ended.stderr.count("\n") == 1
    for word in words:
        assert word in ended.stderr


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout == f"{kvbank.__version__}\n"
    shown = run("--help")
    assert shown.returncode == 0
    for command in ("ping", "bank"):
        assert command in shown.stdout


def test_ping(run: Run, address: str, client: kvbank.Client) -> None:
    answer = json.loads(run("ping", address, "--json").stdout)
    assert answer["store_id"] == client.server_info().store_id
    assert answer["milliseconds"] > 0
    assert client.server_info().store_id in run("ping", address).stdout


def test_banks(
    run: Run,
    address: str,
    client: kvbank.Client,
    make_bank: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = make_bank(capacity=kvbank.Capacity(tokens=123456))
    listed = json.loads(run("bank", "ls", "--memory", address, "--json").stdout)
    assert name in {bank["name"] for bank in listed}
    table = run("bank", "ls", "--memory", address)
    assert table.returncode == 0
    assert "123,456" in table.stdout
    shown = json.loads(run("bank", "show", name, "--memory", address, "--json").stdout)
    assert shown["capacity"]["tokens"] == 123456
    assert shown["kv"]["layers"] == [1, 3]
    assert name in run("bank", "show", name, "--memory", address).stdout
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert run("bank", "rm", name, "--memory", address).returncode == 1
    assert client.get_bank(name).name == name
    assert json.loads(run("bank", "rm", name, "--memory", address, "--yes", "--json").stdout)["deleted"] == name
    with pytest.raises(kvbank.BankNotFound):
        client.get_bank(name)


def test_an_error_is_one_line(run: Run, address: str, unused_port: int) -> None:
    assert_fails_in_one_line(run("bank", "show", "nobody", "--memory", address), "nobody")
    assert_fails_in_one_line(run("ping", f"127.0.0.1:{unused_port}"), "UNAVAILABLE")
    assert_fails_in_one_line(run("ping", "http://host"), "host:port")


def test_usage_errors(run: Run) -> None:
    for arguments in (("ping", "--nothing"), ("brew",), ("bank", "show")):
        assert run(*arguments).returncode == 2


def test_ctrl_c(silent: socket.socket) -> None:
    """Interrupted while it waits for an answer."""
    command = [
        sys.executable,
        "-c",
        "from kvbank.cli import main; main()",
        "ping",
        f"127.0.0.1:{silent.getsockname()[1]}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process, silent.accept()[0]:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_missing_extra_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part is there, and what it needs is not: found out when the command runs."""
    for name in ("sqlalchemy", "memory_service.server"):
        monkeypatch.setitem(sys.modules, name, None)
    ended = run("ping", str(tmp_path / "folder"))
    assert_fails_in_one_line(ended, "pip install 'kvbank[server]'")


def test_a_part_that_cannot_be_imported_still_shows_its_commands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points of parts that are not there: each command names the extra."""
    group = "kvbank.commands"
    broken = [EntryPoint(name, f"kvbank_no_{name}.cli:register", group) for name in ("server", "worker")]
    monkeypatch.setattr(cli, "entry_points", lambda group: broken)
    shown = run("--help").stdout
    for command, extra in (("serve", "server"), ("chat", "worker"), ("demo", "worker")):
        assert command in shown
        ended = run(command)
        assert_fails_in_one_line(ended, f"kvbank_no_{extra}", f"pip install 'kvbank[{extra}]'")
