"""`kvbank serve` prints one line when it serves, and one line when it cannot."""

import signal
import socket
import subprocess
import sys

import pytest


def run(*arguments):
    command = [sys.executable, "-m", "memory_service", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_serves_until_told_to_stop(tmp_path):
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "memory_service", "--data", tmp_path / "d", "--listen", "127.0.0.1:0"]
    with subprocess.Popen([*command, "--ready-file", ready], stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        address = line.rpartition(" on ")[2].strip()
        assert line.startswith(f"kvbank 0.1.0 serving {tmp_path / 'd'} on 127.0.0.1:")
        assert not address.endswith(":0")
        second = run("--data", tmp_path / "d")
        assert second.returncode == 1
        assert second.stderr == (
            f"kvbank: {tmp_path / 'd'} is in use by process {process.pid}; one server owns a data folder\n"
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert ready.read_text() == address + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "kvbank: --data: Field required\n"),
        (["--storage-threads", "0"], 2, "--storage-threads"),
        (["--durability", "never"], 2, "--durability"),
        (["--listen", "127.0.0.1:0", "--max-message-bytes", str(2**31)], 2, "--max-message-bytes"),
        (["--listen", "0.0.0.0:0"], 1, "kvbank: 0.0.0.0:0 can be reached by others"),
        (["--listen", "nonsense"], 1, "kvbank: cannot listen on 'nonsense': it is neither HOST:PORT nor unix:PATH\n"),
        (["--listen", "127.0.0.1:70000"], 1, "kvbank: cannot listen on '127.0.0.1:70000': it is neither"),
        (["--listen", "unix:/no/such/socket"], 1, "kvbank: cannot listen on unix:/no/such/socket: its folder"),
        (
            ["--listen", "127.0.0.1:0", "--ready-file", "/no/such/file"],
            1,
            "kvbank: /no/such/file.tmp: No such",
        ),
        (["--data", __file__], 1, f"kvbank: cannot use {__file__} as data folder: it is a file\n"),
    ],
)
def test_wrong_use_is_one_line(services, tmp_path, arguments, code, text):
    data = ["--data", tmp_path] if arguments else []
    ended, said = services.run("serve", *data, *arguments)
    assert ended == code
    assert text in said
    assert "Traceback" not in said
    assert code == 2 or len([line for line in said.splitlines() if " serving " not in line]) == 1


def test_a_port_that_is_taken(services, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = services.run("serve", "--data", tmp_path, "--listen", address)
    assert code == 1
    assert said == f"kvbank: cannot listen on {address}: Address already in use\n"
