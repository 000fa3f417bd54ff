"""The commands of keys and tenants, against a real service."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvbank
from memory_service.api.embedded import LocalServer

Run = Callable[..., Any]


@pytest.fixture
def keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Iterator[Path]:
    """Serve a folder whose first key is in a file, and let commands go by both; give the file."""
    server = LocalServer(tmp_path / "data", durability="os")
    monkeypatch.setenv("KVBANK_MEMORY", server.address)
    file = tmp_path / "operator"
    ended = run("key", "create", "--role", "operator", "--out", str(file))
    assert (ended.returncode, ended.stderr) == (0, "")
    monkeypatch.setenv("KVBANK_API_KEY", f"@{file}")
    yield file
    server.stop()


def made(run: Run, *words: str) -> dict[str, Any]:
    ended = run("key", "create", *words, "--json")
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def listed(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("key", "ls", "--json").stdout)
    return found


def test_a_key_goes_to_a_private_file_or_is_printed_once(keyed: Path, run: Run, tmp_path: Path) -> None:
    secret = keyed.read_text().strip()
    assert keyed.stat().st_mode & 0o777 == 0o600
    ended = run("key", "create", "--role", "read", "--bank", "team-*", "--bank", "own", "--ttl", "30d")
    assert "kvb_" in ended.stdout
    assert "kvb_" not in ended.stderr
    assert "shown only now" in ended.stderr
    shown = ended.stdout.split()[1]
    assert run("key", "ls").stdout.count("kvb_") == 0
    assert [key["banks"] for key in listed(run)] == [["*"], ["team-*", "own"]]
    assert not any(shown[-32:] in json.dumps(key) or secret[-32:] in json.dumps(key) for key in listed(run))
    taken = run("key", "create", "--role", "read", "--out", str(keyed))
    assert (taken.returncode, taken.stdout) == (1, "")
    assert keyed.read_text().strip() == secret
    nowhere = run("key", "create", "--role", "read", "--out", str(tmp_path / "no" / "key"))
    assert nowhere.returncode == 1
    assert len(listed(run)) == 2
    refused = run("key", "create", "--role", "read", "--tenant", "nobody", "--out", str(tmp_path / "key"))
    assert (refused.returncode, refused.stderr) == (1, "kvbank: there is no tenant 'nobody'\n")
    assert not (tmp_path / "key").exists()


def test_no_key_is_made_in_a_folder_beside_the_service_that_has_it(tmp_path: Path, run: Run) -> None:
    """See to it that a service knows of every key of its store: it looks for the first one only when it begins."""
    with LocalServer(tmp_path / "data", durability="os") as server:
        made = run("key", "create", "--role", "operator", "--memory", str(tmp_path / "data"))
        assert (made.returncode, made.stdout) == (1, "")
        assert "in use by" in made.stderr
        with kvbank.connect(server.address) as owner:
            assert list(owner.access.list_keys()) == []
    made = run("key", "create", "--role", "operator", "--memory", str(tmp_path / "data"))
    assert made.returncode == 0
    with (
        LocalServer(tmp_path / "data", durability="os") as server,
        kvbank.connect(server.address) as stranger,
        pytest.raises(kvbank.Unauthenticated),
    ):
        stranger.server_info()


def test_a_key_is_in_its_file_whatever_becomes_of_the_output(keyed: Path, tmp_path: Path) -> None:
    """Rotate the operator's key, which is refused from then on, where nothing can be printed."""
    key_id, file = keyed.read_text().split("_")[1], tmp_path / "next"
    words = ("key", "rotate", key_id, "--yes", "--out", str(file))
    with open("/dev/full", "wb") as full:
        code = "from kvbank.cli import main; main()"
        ended = subprocess.run([sys.executable, "-u", "-c", code, *words], stdout=full, check=False, timeout=120)
    assert ended.returncode == 1
    with kvbank.connect(os.environ["KVBANK_MEMORY"], api_key=f"@{file}") as client:
        assert client.access.whoami().roles == ("operator",)


def test_commands_go_by_the_key_that_they_are_given(keyed: Path, run: Run, tmp_path: Path) -> None:
    reader = made(run, "--role", "read")["secret"]
    (tmp_path / "reader").write_text(f"{reader}\n")
    for words in (("bank", "ls"), ("ping",), ("stats",), ("top", "--once", "--interval", "0.1")):
        assert run(*words, "--api-key", reader).returncode == 0, words
        assert run(*words, "--api-key", f"@{tmp_path / 'reader'}").returncode == 0, words
        wrong = run(*words, "--api-key", f"{reader}x")
        assert (wrong.returncode, wrong.stderr) == (1, "kvbank: the call needs a key that is valid here\n"), words
    assert run("bank", "ls").returncode == 1  # the operator's key, of the variable
    bad = run("bank", "ls", "--api-key", "two secret words")
    assert bad.returncode == 1
    assert "secret words" not in bad.stdout + bad.stderr
    assert run("compact", "--api-key", reader).returncode == 1
    assert run("compact").returncode == 0


def test_a_key_is_revoked_and_rotated_after_a_question(keyed: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(run, "--role", "read")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\nn\n"))
    for words in (("revoke", first["key_id"]), ("rotate", first["key_id"])):
        assert run("key", *words).returncode == 1
    assert run("ping", "--api-key", first["secret"]).returncode == 0
    later = json.loads(run("key", "rotate", first["key_id"], "--overlap", "1h", "--json").stdout)
    for secret in (first["secret"], later["secret"]):
        assert run("ping", "--api-key", secret).returncode == 0
    now = json.loads(run("key", "rotate", later["key_id"], "--yes", "--json").stdout)
    assert run("ping", "--api-key", later["secret"]).returncode == 1
    assert run("key", "revoke", now["key_id"], "--yes").stdout == f"revoked {now['key_id']} (read of default)\n"
    assert run("ping", "--api-key", now["secret"]).returncode == 1
    assert [line.split()[-1] for line in run("key", "ls").stdout.splitlines()[-2:]] == ["revoked", "revoked"]
    unknown = run("key", "revoke", "unknown", "--yes")
    assert (unknown.returncode, unknown.stderr) == (1, "kvbank: there is no key 'unknown'\n")


def test_tenants_are_made_bounded_and_deleted(keyed: Path, run: Run) -> None:
    assert run("tenant", "create", "red", "--quota", "banks=1,bytes=2GiB").returncode == 0
    admin = made(run, "--role", "admin", "--tenant", "red")["secret"]
    create = ("bank", "create", "--embedder", "e", "--dimension", "4", "--api-key", admin)
    assert run(*create, "first").returncode == 0
    assert run(*create, "second").returncode == 1
    assert run("tenant", "quota", "red", "banks=2,calls=1k").returncode == 0
    assert run(*create, "second").returncode == 0
    default, red = json.loads(run("tenant", "ls", "--json").stdout)
    assert (default["name"], red["name"], red["usage"]["banks"], red["quota"]["banks"]) == ("default", "red", 2, 2)
    assert "banks 2, calls 1,000" in run("tenant", "ls").stdout
    kept = run("tenant", "rm", "red", "--yes")
    assert kept.returncode == 1
    assert "has 2 banks" in kept.stderr
    gone = run("tenant", "rm", "red", "--force", "--yes").stdout
    assert gone.startswith("forgotten  tenant red\n")
    assert "from       banks 2\n" in gone
    assert run("ping", "--api-key", admin).returncode == 1
    for quota in ("banks", "banks=0x1", "banks=1,banks=2", "seconds=1", "banks=0"):
        assert run("tenant", "create", "blue", "--quota", quota).returncode in (1, 2), quota


def test_top_tells_a_tenant_what_it_does_not_show(keyed: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("tenant", "create", "red")
    monkeypatch.setenv("KVBANK_API_KEY", made(run, "--role", "write", "--tenant", "red")["secret"])
    shown = run("top", "--once", "--interval", "100ms").stdout
    assert "for operators" in shown
    assert "disk" not in shown


def test_a_role_that_there_is_none_of_is_told_in_plain_words(keyed: Path, run: Run) -> None:
    ended = run("key", "create", "--role", "boss")
    assert ended.returncode == 2
    assert ended.stderr.startswith("kvbank: Invalid value for '--role': 'boss' is not one of ")
