"""Nothing that a person types in a chat is lost, and nothing that a model says is obeyed by a terminal."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.cli.commands import register
from model_worker.session.unanswered import Unanswered
from tests.support import command
from tests.support.diagonal import rotated

from .conftest import said_in


class Typing(io.StringIO):
    """What a person types; before a line is read, something may happen."""

    def __init__(self, *lines: str, before: dict[str, Callable[[], object]] | None = None) -> None:
        super().__init__("".join(f"{line}\n" for line in lines))
        self._before = before or {}

    def __next__(self) -> str:
        line = super().__next__()
        self._before.get(line.strip(), lambda: None)()
        return line


def kvbank_command(*arguments: object, **streams: Any) -> command.Ended:
    app = typer.Typer()
    register(app)
    return command.run(app, *arguments, **streams)


@pytest.fixture
def chat(model_folder: Path, address: str, sea: str) -> list[object]:
    return ["chat", "-s", sea, "--memory", address, "--model", model_folder, "--max-new-tokens", 3]


def unanswered(address: str, name: str) -> list[str]:
    with kvbank.connect(address) as client:
        return Unanswered(client.sessions.get(name=name).session_id).messages()


@pytest.mark.parametrize(
    ("trouble", "code"),
    rotated([(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 1), (RuntimeError, 70)], 1),
)
def test_a_turn_that_fails_is_kept_and_told_at_the_next_start(
    chat: list[object], address: str, sea: str, trouble: BaseException, code: int
) -> None:
    """Whatever it fails with, Ctrl-C too: here where the answer is printed."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            if "> who" in text:
                self.breaks = True
            elif getattr(self, "breaks", False):
                raise trouble
            return super().write(text)

    ended = kvbank_command(*chat, stdin="ahoy\n")
    assert ended.exit_code == 0, ended.output
    ended = kvbank_command(*chat, stdin=Typing("who", "never read"), stdout=Full())
    assert ended.exit_code == code
    assert "Traceback" not in ended.stderr
    assert said_in(address, sea) == ["ahoy"]
    again = kvbank_command(*chat, stdin="where\n")
    assert again.exit_code == 0
    assert "not answered, the last: 'who'" in again.stderr
    assert unanswered(address, sea) == ["who"]
    assert kvbank_command(*chat, stdin="who\n").exit_code == 0
    assert "not answered" not in kvbank_command(*chat).stderr
    assert said_in(address, sea) == ["ahoy", "where", "who"]


@pytest.mark.slow  # a chat rides through a restart of its service for some 20 s
def test_what_is_said_while_the_service_is_away_is_kept(chat: list[object], tmp_path: Path, sea: str) -> None:
    server = LocalServer(tmp_path / "data")
    chat[chat.index("--memory") + 1] = server.address
    typing = Typing("ahoy", "wörds " * 100, before={("wörds " * 100).strip(): server.stop})
    ended = kvbank_command(*chat, "--window", 64, stdin=typing)
    assert ended.exit_code == 1
    assert ended.stderr.splitlines()[-1].startswith("kvbank: ")
    assert "Traceback" not in ended.stderr
    with LocalServer(tmp_path / "data") as again:
        kept = [*said_in(again.address, sea), *unanswered(again.address, sea)]
    assert kept == ["ahoy", ("wörds " * 100).strip()]


def test_bytes_that_are_not_utf8_are_taken_as_latin1(chat: list[object], address: str, sea: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nna\xc3\xafve\n"), "utf-8", errors="surrogateescape")
    ended = kvbank_command(*chat, stdin=stream)
    assert ended.exit_code == 0, ended.output
    assert said_in(address, sea) == ["café", "naïve"]


@pytest.mark.parametrize(
    "template",
    rotated(["{{ raise_exception('no\nway') }}", "{{ 1 / 0 }}", "{% for", "{{ nobody.there.at_all }}", 7], 0, every=2),
)
def test_a_template_that_fails_is_told_before_anything_is_said(
    chat: list[object], model_folder: Path, tmp_path: Path, template: object
) -> None:
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    config = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    typing = Typing("ahoy")
    ended = kvbank_command(*[broken if part == model_folder else part for part in chat], stdin=typing)
    assert ended.exit_code == 1
    assert ended.stderr.startswith("kvbank: ")
    assert ended.stderr.count("\n") == 1
    assert typing.read() == "ahoy\n"


def test_what_was_said_and_answered_is_shown_without_being_obeyed(chat: list[object], address: str, sea: str) -> None:
    typed = "red \x1b[31m title \x1b]0;x\x07 turned \u202e csi \x9b31m family 👨‍👩‍👧 wide\u3000space"
    ended = kvbank_command(*chat, stdin=f"{typed}\n/turns\n")
    assert ended.stdout.count(r"red \x1b[31m") == 2
    for text in (ended.stdout,):
        assert not set(text) & set("\x1b\x07\x9b\u202e")
        assert r"red \x1b[31m title \x1b]0;x\x07 turned \u202e csi \x9b31m family 👨‍👩‍👧 wide　space" in text
    assert said_in(address, sea) == [typed]
