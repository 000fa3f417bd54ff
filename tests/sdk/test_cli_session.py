"""The commands of sessions, against a real service."""

import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvbank
from kvbank.commands import application
from tests.sdk.test_session_files import old_folder
from tests.sdk.test_sessions import talk
from tests.support import command

Run = Callable[..., Any]


@pytest.fixture
def run(address: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command of the client alone, without a word of other parts."""
    monkeypatch.setenv("KVBANK_MEMORY", address)
    return lambda *words: command.run(application(()), *map(str, words))


@pytest.fixture
def diary(client: kvbank.Client) -> str:
    """Give the name of a session of three turns."""
    name = f"diary-{uuid.uuid4().hex}"
    talk(client, 3, name=name, metadata={"user": name})
    return name


def test_sessions_are_listed_and_shown(run: Run, client: kvbank.Client, diary: str) -> None:
    session = client.sessions.acquire(client.sessions.get(name=diary).session_id, "worker-1")
    lines = run("session", "ls", "--metadata", f"user={diary}").stdout.splitlines()
    assert lines[0].split() == ["name", "id", "turns", "tokens", "bank", "held", "by", "age"]
    assert lines[-1].split()[:6] == [diary, session.session_id, "3", "9", session.bank, "worker-1"]
    (found,) = json.loads(run("session", "ls", "--metadata", f"user={diary}", "--json").stdout)
    assert (found["name"], found["head"], found["lease"]["holder"]) == (diary, 3, "worker-1")
    assert json.loads(run("session", "ls", "--metadata", "user=nobody", "--json").stdout) == []
    assert run("session", "ls", "--metadata", "user").exit_code == 2
    shown = run("session", "show", diary, "--last", "1").stdout
    assert "user: question 3\nassistant: answer 3\n" in shown
    assert "question 2" not in shown
    assert f"metadata   user = {diary}\n" in shown
    document = json.loads(run("session", "show", session.session_id, "--json").stdout)
    assert [turn["number"] for turn in document["last_turns"]] == [1, 2, 3]
    unknown = run("session", "show", "nobody")
    assert (unknown.exit_code, unknown.stdout, unknown.stderr.count("\n")) == (1, "", 1)


def test_sessions_are_forked_and_rewound(run: Run, client: kvbank.Client, diary: str) -> None:
    ended = run("session", "fork", diary, f"{diary}-2", "--turn", "2")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout == f"session {diary}-2 goes on from {diary} behind turn 2\n"
    assert json.loads(run("session", "fork", diary, "--json").stdout)["head"] == 3
    assert run("session", "fork", diary, f"{diary}-2").exit_code == 1
    ended = run("session", "rewind", diary, "1", "--yes")
    assert ended.stdout == f"session {diary} goes on behind turn 1, 2 turns before its end\n"
    session = client.sessions.get(name=diary)
    assert (session.head, session.lease) == (1, None)
    client.sessions.acquire(session.session_id, "worker-1")
    held = run("session", "rewind", diary, "0", "--yes")
    assert held.exit_code == 1
    assert "worker-1" in held.stderr


def test_a_session_is_moved_in_a_file(run: Run, client: kvbank.Client, diary: str, tmp_path: Path) -> None:
    file = tmp_path / "diary.kvsession"
    assert run("session", "export", diary, file).stdout == f"exported 3 turns, 9 tokens to {file}\n"
    again = run("session", "export", diary, file)
    assert (again.exit_code, "is there already" in again.stderr) == (1, True)
    assert run("session", "export", diary, file, "--force", "--json").exit_code == 0
    ended = run("session", "import", file, "--name", f"{diary}-2")
    assert ended.stdout == f"imported 3 turns, 9 tokens as session {diary}-2\n"
    taken = run("session", "import", file)
    assert (taken.exit_code, "another name" in taken.stderr, taken.stderr.count("\n")) == (1, True, 1)
    file.write_bytes(file.read_bytes()[:-1])
    cut = run("session", "import", file, "--name", "new")
    assert (cut.exit_code, cut.stderr) == (1, f"kvbank: {file}: line 4 is damaged; nothing behind it can be read\n")
    old = run("session", "import", old_folder(tmp_path), "--name", f"{diary}-3", "--json")
    assert json.loads(old.stdout)["tokens"] == 6


def test_what_is_forgotten_is_asked_for(
    run: Run, client: kvbank.Client, diary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\nn\nn\n"))
    for words in (("rm", diary), ("forget", diary, "1-2"), ("rewind", diary, "1")):
        assert run("session", *words).exit_code == 1
    assert client.sessions.get(name=diary).head == 3
    for wrong in ("0", "2-1", "a", "1-", "-1", "1,2"):
        assert run("session", "forget", diary, "--yes", "--", wrong).exit_code == 2
    removed = run("session", "rm", diary, "--yes")
    assert (removed.exit_code, removed.stderr) == (0, "")
    assert "turns      3, 9 tokens\n" in removed.stdout
    assert run("session", "show", diary).exit_code == 1


def test_banks_without_a_session_are_found(
    run: Run, client: kvbank.Client, embedding: kvbank.EmbeddingSpec, diary: str
) -> None:
    mine, lost = client.sessions.get(name=diary).bank, f"session-{uuid.uuid4().hex[:16]}"
    older = f"session-sea-{uuid.uuid4().hex[:8]}"
    for name in (mine, lost, older, f"session-{uuid.uuid4().hex}x"):
        client.create_bank(name, kv=None, embedding=embedding)
    found = [bank["name"] for bank in json.loads(run("bank", "ls", "--orphans", "--json").stdout)]
    assert {lost, older} <= set(found)
    assert mine not in found
    assert all(name.startswith("session-") and not name.endswith("x") for name in found)
