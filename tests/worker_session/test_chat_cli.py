"""`kvbank chat` and `kvbank session` through their real commands."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.cli.terminal import Waiting, printable
from model_worker.session.folder import read_session
from model_worker.session.log import SessionLog
from tests.support import command


def kvbank_command(*arguments: object, stdin: str = "") -> command.Ended:
    return command.run(command.application(), *arguments, stdin=stdin)


@pytest.fixture
def chat(model_folder: Path, address: str, tmp_path: Path) -> list[object]:
    return ["chat", "-s", "sea", "--sessions", tmp_path, "--memory", address, "--model", model_folder]


def test_a_piped_conversation_prints_answers_only(chat: list[object], tmp_path: Path) -> None:
    options = ["--plain", "--max-new-tokens", 5, "--format", "plain"]
    done = kvbank_command(*chat, *options, stdin="ahoy\n\nwho\n/quit\nno\n")
    assert (done.exit_code, done.stderr) == (0, "")
    turns = read_session(tmp_path, "sea")[1]
    assert [turn.text for turn in turns] == ["ahoy", "who"]
    assert done.stdout == "".join(f"{printable(turn.answer)}\n" for turn in turns)


def test_goes_on_with_its_own_model_and_service(chat: list[object], tmp_path: Path) -> None:
    first = kvbank_command(*chat, "--max-new-tokens", 3, stdin="ahoy\n")
    assert first.exit_code == 0, first.output
    again = kvbank_command(*chat[:5], "--max-new-tokens", 3, stdin="/help\n/sing\nwho\n")
    assert again.exit_code == 0, again.output
    assert "goes on after 1 turn," in again.stderr
    assert "there is no command /sing" in again.stderr
    assert "> who" in again.stdout
    assert len(read_session(tmp_path, "sea")[1]) == 2


def test_it_says_what_an_answer_was_made_of_and_what_the_bank_holds(chat: list[object], tmp_path: Path) -> None:
    """Ask `/why` and `/memory` before anything was said, and behind turns that have pushed chunks into the bank."""
    options = ["--plain", "--max-new-tokens", 3, "--window", 64, "--top-k", 2, "--format", "plain"]
    talk = "the sea is wide and the ships come and go\nwhat did I say of the sea and the ships?\nof the sea?\n"
    done = kvbank_command(*chat, *options, stdin=f"/why\n/memory\n{talk}/why 1\n/why many\n/memory\n")
    assert (done.exit_code, done.stderr) == (0, "")
    bank = read_session(tmp_path, "sea")[0].bank
    lines = done.stdout.splitlines()
    assert lines[:2] == ["there is no answer yet", f"bank {bank}: 0 chunks, 0 tokens"]
    begin = next(at for at, line in enumerate(lines) if line.split() == ["mass", "score", "from", "age", "text"])
    assert "the sea is wide" in lines[begin + 1]
    assert "asked for: of the sea?" in lines[begin:]
    assert "/why takes how many chunks to show, such as /why 5, not 'many'" in lines
    assert re.fullmatch(rf"bank {bank}: \d+ chunks?, \d+ tokens", lines[-3])
    assert re.match(r"newest, \d+ s ago: ", lines[-2])
    assert re.match(r"retrieved \d+ times?: .*the sea is wide", lines[-1])


def test_a_local_rule_is_taken_and_a_change_of_it_told(chat: list[object], tmp_path: Path) -> None:
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
    """Session, fork and memory in the user's own folders are closed to others, whatever the umask."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    for variable in ("XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(variable, str(home / variable))
    monkeypatch.delenv("KVBANK_MEMORY", raising=False)
    before = os.umask(umask)
    try:
        said = kvbank_command("chat", "-s", "sea", *chat[7:], "--max-new-tokens", 90, "--window", 64, stdin="ahoy\n")
        forked = kvbank_command("session", "fork", "sea", "shore")
    finally:
        os.umask(before)
    assert (said.exit_code, forked.exit_code) == (0, 0), said.output + forked.output
    made = [path for path in home.rglob("*") if not path.is_socket()]
    assert {"metadata.db", "log.jsonl", "sea", "shore"} <= {path.name for path in made}
    assert [str(path) for path in made if path.stat().st_mode & 0o077] == []


def test_ls_show_rm(chat: list[object], address: str, tmp_path: Path) -> None:
    assert kvbank_command(*chat, "--max-new-tokens", 90, "--window", 64, stdin="ahoy\nwho\n").exit_code == 0
    folder = ["--sessions", tmp_path]
    [listed] = json.loads(kvbank_command("session", "ls", *folder, "--json").stdout)
    assert (listed["name"], listed["turns"]) == ("sea", 2)
    assert "sea" in kvbank_command("session", "ls", *folder).stdout
    shown = json.loads(kvbank_command("session", "show", "sea", *folder, "--json", "--last", 1).stdout)
    assert [said["text"] for said in shown["said"]] == ["who"]
    assert "> ahoy" in kvbank_command("session", "show", "sea", *folder).stdout
    with kvbank.connect(address) as client:
        assert client.get_bank(listed["bank"]).usage.chunks > 0
        assert kvbank_command("session", "rm", "sea", *folder, stdin="n\n").exit_code == 1
        removed = kvbank_command("session", "rm", "sea", *folder, "--yes", "--json")
        assert json.loads(removed.stdout)["deleted"] == "sea"
        with pytest.raises(kvbank.BankNotFound):
            client.get_bank(listed["bank"])
    assert list(tmp_path.iterdir()) == []
    assert json.loads(kvbank_command("session", "ls", *folder, "--json").stdout) == []


def test_the_log_stays_when_the_service_is_away(chat: list[object], tmp_path: Path) -> None:
    server = LocalServer(tmp_path / "data")
    chat[chat.index("--memory") + 1] = server.address
    assert kvbank_command(*chat, "--max-new-tokens", 3, stdin="ahoy\n").exit_code == 0
    server.stop()
    removed = kvbank_command("session", "rm", "sea", "--sessions", tmp_path, "--yes")
    assert removed.exit_code == 1
    assert removed.stderr.startswith("kvbank: ")
    assert removed.stderr.count("\n") == 1
    assert len(read_session(tmp_path, "sea")[1]) == 1


def test_a_service_with_keys_is_talked_to_by_a_key(chat: list[object], tmp_path: Path) -> None:
    with LocalServer(tmp_path / "data") as server:
        with kvbank.connect(server.address) as owner:
            (tmp_path / "key").write_text(owner.access.create_key("admin", banks=["chat-*"]).secret)
        key = ["--api-key", f"@{tmp_path / 'key'}"]
        chat[chat.index("--memory") + 1] = server.address
        chat += ["--bank", "chat-sea", "--max-new-tokens", 3]
        refused = kvbank_command(*chat, stdin="ahoy\n")
        assert (refused.exit_code, refused.stderr) == (1, "kvbank: the call needs a key that is valid here\n")
        assert kvbank_command(*chat, *key, stdin="ahoy\n").exit_code == 0
        remove = ["session", "rm", "sea", "--sessions", tmp_path, "--yes"]
        assert kvbank_command(*remove).exit_code == 1
        assert kvbank_command(*remove, *key).exit_code == 0
        with kvbank.connect(server.address, api_key=key[1]) as client:
            assert list(client.list_banks()) == []


def test_the_log_stays_when_the_bank_is_elsewhere(chat: list[object], tmp_path: Path) -> None:
    """Deleting by a wrong --memory would leave a bank that is in no list any more."""
    assert kvbank_command(*chat, "--max-new-tokens", 3, stdin="ahoy\n").exit_code == 0
    remove = ["session", "rm", "sea", "--sessions", tmp_path, "--yes", "--memory", tmp_path / "other"]
    refused = kvbank_command(*remove)
    assert refused.exit_code == 1
    assert "nothing was deleted" in refused.stderr
    assert len(read_session(tmp_path, "sea")[1]) == 1
    assert kvbank_command(*remove, "--force").exit_code == 0
    assert not (tmp_path / "sea").exists()


def test_what_force_leaves_is_said_and_kept_for_later(chat: list[object], tmp_path: Path) -> None:
    """Banks of sessions that were deleted while their service was away are noted, found, and deleted later."""
    sessions = ["--sessions", tmp_path]
    data = tmp_path / "data"
    with LocalServer(data) as server:
        chat[chat.index("--memory") + 1] = server.address
        assert kvbank_command(*chat, "--max-new-tokens", 3, stdin="ahoy\n").exit_code == 0
        kept = kvbank_command("chat", "-s", "kept", *chat[3:], "--max-new-tokens", 3, stdin="ahoy\n")
        assert kept.exit_code == 0
    banks = {name: read_session(tmp_path, name)[0].bank for name in ("sea", "kept")}
    removed = kvbank_command("session", "rm", "sea", *sessions, "--yes", "--force", "--json")
    assert removed.exit_code == 0
    assert json.loads(removed.stdout) == {"deleted": "sea", "turns": 1, "bank": banks["sea"], "bank_deleted": False}
    assert f"bank {banks['sea']} was not deleted" in removed.stderr
    assert not (tmp_path / "sea").exists()
    listed = kvbank_command("session", "ls", *sessions, "--json")
    assert [facts["name"] for facts in json.loads(listed.stdout)] == ["kept"]
    assert "still there: 1; kvbank session clean" in listed.stderr
    away = kvbank_command("session", "clean", *sessions)
    assert away.exit_code == 1
    assert f"bank {banks['sea']} of session sea is still there" in away.stderr
    with LocalServer(data, listen=server.address):
        cleaned = kvbank_command("session", "clean", *sessions)
        assert (cleaned.exit_code, cleaned.stdout) == (0, f"deleted bank {banks['sea']} of session sea\n")
    assert kvbank_command("session", "clean", *sessions).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "kept"]


def test_what_cannot_be_is_said_before_a_model_is_loaded(
    chat: list[object], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    with LocalServer(data), SessionLog.open(tmp_path, "busy"):
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
            (["-s", "busy"], "in use by another process"),
        ]:
            done = kvbank_command(*chat, *options, stdin="ahoy\n")
            assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
            assert text in done.stderr
    assert not (tmp_path / "sea").exists()
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


def test_a_damaged_session_does_not_stop_the_others(chat: list[object], tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "log.jsonl").write_text("{}\n{}\n")
    assert kvbank_command(*chat, "--max-new-tokens", 3, stdin="ahoy\n").exit_code == 0
    listed = kvbank_command("session", "ls", "--sessions", tmp_path, "--json")
    assert [facts["name"] for facts in json.loads(listed.stdout)] == ["sea"]
    assert "line 1 is damaged" in listed.stderr


def test_errors_are_one_line(chat: list[object], other_model_folder: Path, tmp_path: Path) -> None:
    assert kvbank_command(*chat, "--max-new-tokens", 3, stdin="ahoy\n").exit_code == 0
    wrong_model = [*chat[:-1], other_model_folder]
    folder = ["--sessions", tmp_path]
    with SessionLog.open(tmp_path, "busy"):
        for arguments, text in [
            (wrong_model, "was begun with model"),
            ([*chat[:-1], tmp_path / "nothing"], "there is no model folder"),
            ([*chat, "--compressor", "zip"], "unknown compressor"),
            ([*chat, "--format", "sung"], "format 'sung'"),
            ([*chat, "--window", 3], "smaller than a chunk"),
            (["chat", "-s", "../x", *chat[3:]], "session name"),
            (["chat", "-s", "busy", *chat[3:]], "in use by another process"),
            (["session", "show", "nobody", *folder], "no session 'nobody'"),
            (["session", "rm", "nobody", *folder, "--yes"], "no session 'nobody'"),
            (["session", "ls", "--sessions", tmp_path / "none"], "there is no folder"),
            (["session", "ls", "--sessions", __file__], "is a file: --sessions is a folder"),
            (["chat", "-s", "sea", "--sessions", __file__], "is a file: --sessions is a folder"),
        ]:
            done = kvbank_command(*arguments)
            assert done.exit_code == 1, done.output
            assert done.stderr.startswith("kvbank: "), done.output
            assert text in done.stderr
            assert done.stderr.count("\n") == 1
