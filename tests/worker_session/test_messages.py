"""What a person types, pastes or pipes, as messages."""

import io
import json
import os
import pty
import select
import sys
from contextlib import suppress

import pytest

from model_worker.cli.messages import messages

READER = """
import json
from kvbank.console.streams import prepare
from model_worker.cli.messages import messages

prepare()
for message in messages(True, ["before"]):
    print(json.dumps(message))
"""
READY = b"\x1b[?2004h"  # asks the terminal to mark what is pasted


def test_lines_that_are_pasted_are_one_message() -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-c", READER], {**os.environ, "TERM": "xterm"})
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([terminal], [], [], 30)[0], shown
            shown += os.read(terminal, 65536)
        shown = shown.partition(text)[2]

    for keys, message in [
        (b"\x1b[200~first\n/second\n\nthird\x1b[201~\r", "first\n/second\n\nthird"),
        (b"typed\r", "typed"),
        (b"\x1b[A\x1b[A\x1b[A\x1b[A\r", "before"),
    ]:
        wait_for(READY)
        os.write(terminal, keys)
        wait_for(json.dumps(message).encode())
    wait_for(READY)
    os.write(terminal, b"left by Ctrl-C")
    wait_for(b"left by Ctrl-C")
    os.write(terminal, b"\x03")
    while not select.select([terminal], [], [], 1)[0]:  # Python hears a signal only while it waits for a key
        os.write(terminal, b"\x03")
    wait_for(READY)
    os.write(terminal, b"\x1b[A\r")
    wait_for(b'"left by Ctrl-C"')
    wait_for(READY)
    os.write(terminal, b"\x04")
    with suppress(OSError):  # EIO: the other end has closed
        while os.read(terminal, 65536):
            pass
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0


def test_a_pipe_has_a_message_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Chats show the messages, as part of their turns."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff one\n\ntwo \x1b[2J\nthree"))
    assert list(messages(False, [])) == ["one", "", "two \x1b[2J", "three"]
    assert capsys.readouterr().out == ""
