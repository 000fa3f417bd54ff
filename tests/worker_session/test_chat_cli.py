"""`kvbank chat` through its real command."""

import os
import re
import shutil
from pathlib import Path

import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.cli.terminal import Waiting, printable
from tests.support import command

from .conftest import said_in


def kvbank_command(*arguments: object, stdin: str = "") -> command.Ended:
    return command.run(command.application(), *arguments, stdin=stdin)


@pytest.fixture
def chat(model_folder: Path, address: str, sea: str) -> list[object]:
    return ["chat", "-s", sea, "--memory", address, "--model", model_folder]


def test_a_piped_conversation_prints_answers_only(chat: list[object], address: str, sea: str) -> None:
    options = ["--plain", "--max-new-tokens", 5, "--format", "plain"]
    done = kvbank_command(*chat, *options, stdin="ahoy\n\nwho\n/quit\nno\n")
    assert (done.exit_code, done.stderr) == (0, "")
    with kvbank.connect(address) as client:
        turns = list(client.sessions.turns(client.sessions.get(name=sea).session_id))
    assert [turn.text("user") for turn in turns] == ["ahoy", "who"]
    assert done.stdout == "".join(f"{printable(turn.text('assistant'))}\n" for turn in turns)


def test_goes_on_with_its_own_model(chat: list[object], address: str, sea: str) -> None:
    first = kvbank_command(*chat, "--max-new-tokens", 3, stdin="ahoy\n")
    assert first.exit_code == 0, first.output
    again = kvbank_command(*chat[:5], "--max-new-tokens", 3, stdin="/help\n/sing\nwho\n")
    assert again.exit_code == 0, again.output
    assert "goes on after 1 turn," in again.stderr
    assert "there is no command /sing" in again.stderr
    assert "> who" in again.stdout
    assert said_in(address, sea) == ["ahoy", "who"]


def test_it_says_what_an_answer_was_made_of_and_what_the_bank_holds(chat: list[object], address: str, sea: str) -> None:
    """Ask `/why` and `/memory` before anything was said, and behind turns that have pushed chunks into the bank."""
    options = ["--plain", "--max-new-tokens", 3, "--window", 64, "--top-k", 2, "--format", "plain"]
    talk = "the sea is wide and the ships come and go\nwhat did I say of the sea and the ships?\nof the sea?\n"
    done = kvbank_command(*chat, *options, stdin=f"/why\n/memory\n{talk}/why 1\n/why many\n/memory\n")
    assert (done.exit_code, done.stderr) == (0, "")
    with kvbank.connect(address) as client:
        bank = client.sessions.get(name=sea).bank
    lines = done.stdout.splitlines()
    assert lines[:2] == ["there is no answer yet", f"bank {bank}: 0 chunks, 0 tokens"]
    begin = next(at for at, line in enumerate(lines) if line.split() == ["mass", "score", "from", "age", "text"])
    assert re.search(r" turn [12], user\+assistant .*the sea ", lines[begin + 1])
    assert "asked for: of the sea?" in lines[begin:]
    assert "/why takes how many chunks to show, such as /why 5, not 'many'" in lines
    bank_line, newest, *often = lines[-4:]
    assert re.fullmatch(rf"bank {bank}: 2 chunks, \d+ tokens", bank_line)
    assert re.match(r"newest, \d+ s ago: ", newest)
    assert all(re.match(r"retrieved \d+ times?: .*the sea ", line) for line in often)
    # Another process knows it too, for as long as the chunks are there.
    again = kvbank_command(*chat, *options, stdin="/why 1\n").stdout.splitlines()
    assert again[1].split()[:3] == lines[begin + 1].split()[:3]
    with kvbank.connect(address) as client:
        client.delete_chunks(bank, [chunk.chunk_id for chunk in client.list_chunks(bank)])
    gone = kvbank_command(*chat, *options, stdin="/why 1\n").stdout
    assert "(no longer in the bank)" in gone
    assert "ships" not in gone.replace("of the sea?", "")


def test_what_was_said_is_listed_taken_back_and_forked(chat: list[object], address: str, sea: str) -> None:
    said = "one\ntwo\n/undo\nthree\n/fork {0}-fork\nfour\n/turns 2\n/fork\n"
    done = kvbank_command(*chat, "--max-new-tokens", 3, stdin=said.format(sea))
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "kvbank: /fork NAME: the new session needs a name"
    assert re.search(r"^ +2  three\n +3  four$", done.stdout, re.MULTILINE)
    assert "turn 2 is taken back" in done.stderr
    assert said_in(address, sea) == ["one", "three", "four"]
    assert said_in(address, f"{sea}-fork") == ["one", "three"]
    done = kvbank_command(*chat, stdin="/forget 9\n")
    assert done.stderr.splitlines()[-1] == "kvbank: there is no turn 9; /turns lists them"
    done = kvbank_command(*chat, stdin="/forget x\n")
    assert done.stderr.splitlines()[-1] == "kvbank: 'x' is no number of a turn; /turns lists them"


def test_without_a_name_each_terminal_has_a_session_of_its_own(model_folder: Path, tmp_path: Path) -> None:
    with LocalServer(tmp_path / "data") as server, kvbank.connect(server.address) as client:
        chat = ["chat", "--memory", server.address, "--model", model_folder, "--max-new-tokens", 2]
        assert "session 'default' begins" in kvbank_command(*chat, stdin="ahoy\n").stderr
        client.sessions.acquire(client.sessions.get(name="default").session_id, "another terminal")
        assert "session 'default-2' begins" in kvbank_command(*chat, stdin="ahoy\n").stderr
        assert "session 'default-2' goes on" in kvbank_command(*chat, stdin="ahoy\n").stderr
        busy = kvbank_command(*chat, "-s", "default", stdin="ahoy\n")
        assert busy.exit_code == 1
        assert "kvbank: session 'default' is in use by another terminal; it is free once that ends" in busy.stderr


def test_a_session_of_an_earlier_release_is_named(
    chat: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "kvbank" / "sessions" / "diary"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").touch()
    done = kvbank_command("chat", "-s", "diary", *chat[3:], stdin="ahoy\n")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert f"kvbank session import {folder} --memory {chat[4]}" in done.stderr


def test_a_local_rule_is_taken_and_a_change_of_it_told(chat: list[object]) -> None:
    options = ["--plain", "--max-new-tokens", 3]
    for _ in range(2):
        done = kvbank_command(*chat, *options, "--local", "tova:m=16", stdin="ahoy\n")
        assert (done.exit_code, done.stderr) == (0, "")
    done = kvbank_command(*chat, *options, stdin="who\n")
    assert done.exit_code == 0
    assert done.stderr.count("\n") == 1
    assert "under the local rule tova:m=16 and goes on under none" in done.stderr
    done = kvbank_command(*chat, *options, "--local", "best", stdin="who\n")
    assert done.exit_code == 1
    assert done.stderr.startswith("kvbank: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_what_was_said_is_its_owners_alone(
    chat: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    """Sessions and memory in the user's own folders are closed to others, whatever the umask."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    for variable in ("XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(variable, str(home / variable))
    before = os.umask(umask)
    try:
        said = kvbank_command("chat", *chat[5:], "--max-new-tokens", 90, "--window", 64, stdin="ahoy\n")
    finally:
        os.umask(before)
    assert said.exit_code == 0, said.output
    made = [path for path in home.rglob("*") if not path.is_socket()]
    assert "metadata.db" in {path.name for path in made}
    assert [str(path) for path in made if path.stat().st_mode & 0o077] == []


def test_a_service_with_keys_is_talked_to_by_a_key(chat: list[object], tmp_path: Path) -> None:
    with LocalServer(tmp_path / "data") as server:
        with kvbank.connect(server.address) as owner:
            (tmp_path / "key").write_text(owner.access.create_key("admin").secret)
        key = ["--api-key", f"@{tmp_path / 'key'}"]
        chat[4] = server.address
        chat += ["--max-new-tokens", 3]
        refused = kvbank_command(*chat, stdin="ahoy\n")
        assert (refused.exit_code, refused.stderr) == (1, "kvbank: the call needs a key that is valid here\n")
        assert kvbank_command(*chat, *key, stdin="ahoy\n").exit_code == 0


def test_what_cannot_be_is_said_before_a_model_is_loaded(
    chat: list[object], address: str, sea: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused are a folder that another process serves, with what to do; a service that is away; a path that is not
    there."""
    monkeypatch.chdir(tmp_path)
    # Its loading would end in another sentence.
    shutil.copytree(model_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
    chat = [*chat[:-1], tmp_path / "damaged"]
    (tmp_path / "models").mkdir()
    (tmp_path / "file").touch()
    data = tmp_path / "da ta"
    with LocalServer(data), kvbank.connect(address) as client:
        client.sessions.acquire(client.sessions.create(name=f"{sea}-busy").session_id, "another")
        for options, text in [
            (
                ["--memory", data],
                f"serve the folder to all: kvbank serve --data '{data}' --listen 127.0.0.1:7400, then in",
            ),
            (["--memory", "127.0.0.1:9"], "127.0.0.1:9"),
            (["--model", "models/nope"], "there is no model folder 'models/nope'"),
            (["--model", "./nope"], "there is no model folder './nope'"),
            (["--model", "no pe"], "there is no model folder 'no pe'"),
            (["--model", "nope/"], "there is no model folder 'nope/'"),
            (["--model", "file"], "file is a file"),
            (["--model", "models"], "it has no config.json"),
            (["-s", f"{sea}-busy"], "is in use by another"),
        ]:
            done = kvbank_command(*chat, *options, stdin="ahoy\n")
            assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
            assert text in done.stderr
        assert sea not in [session.name for session in client.sessions.list()]
    assert "damaged" in kvbank_command(*chat, stdin="ahoy\n").stderr


def test_a_long_message_is_read_with_a_word_now_and_then(chat: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Words come at once and at each chunk here, else after seconds; a bank that is written again has them too."""
    monkeypatch.setattr(Waiting, "FIRST_S", 0.0)
    monkeypatch.setattr(Waiting, "EVERY_S", 0.0)
    options = ["--plain", "--max-new-tokens", 3, "--format", "plain"]
    done = kvbank_command(*chat, *options, stdin="word " * 200 + "\n")
    assert done.exit_code == 0
    told = re.findall(r"reading your message: ([0-9,]+) of 1,0\d\d tokens", done.stderr)
    assert len(told) > 5
    assert told == sorted(told, key=lambda figure: int(figure.replace(",", "")))
    assert len(done.stdout.splitlines()) == 1


def test_errors_are_one_line(chat: list[object], other_model_folder: Path, sea: str, tmp_path: Path) -> None:
    assert kvbank_command(*chat, "--max-new-tokens", 3, stdin="ahoy\n").exit_code == 0
    for arguments, text in [
        ([*chat[:-1], other_model_folder], "was begun with model"),
        ([*chat[:-1], tmp_path / "nothing"], "there is no model folder"),
        ([*chat, "--compressor", "zip"], "unknown compressor"),
        ([*chat, "--format", "sung"], "format 'sung'"),
        ([*chat, "--window", 3], "smaller than a chunk"),
        (["chat", "-s", "x" * 500, *chat[3:]], "name"),
    ]:
        done = kvbank_command(*arguments)
        assert done.exit_code == 1, done.output
        assert done.stderr.startswith("kvbank: "), done.output
        assert text in done.stderr
        assert done.stderr.count("\n") == 1
