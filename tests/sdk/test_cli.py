"""The command line is run: output for people and machines, exit codes, missing extras."""

import io
import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest

import kvbank
from kvbank.commands import application
from tests.cli.tree import commands
from tests.sdk.relay import Relay
from tests.support import command
from tests.support.waiting import wait_until

READER, EMBEDDER = "ab" * 32, "cd" * 32


Run = Callable[..., Any]


def assert_fails_in_one_line(ended: Any, *words: str) -> None:
    code, stdout, stderr = ended
    assert (code, stdout) == (1, "")
    assert stderr.startswith("kvbank: ")
    assert stderr.count("\n") == 1
    for word in words:
        assert word in stderr


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout == f"{kvbank.__version__}\n"
    shown = run("--help")
    assert shown.returncode == 0
    for name in ("ping", "bank"):
        assert name in shown.stdout


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
    assert (shown["quota"], shown["expiry"], shown["index"]) == (None, None, "auto")
    assert shown["index_state"]["kind"] == "exact"
    assert shown["kv"]["layers"] == [1, 3]
    assert name in run("bank", "show", name, "--memory", address).stdout
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert run("bank", "rm", name, "--memory", address).returncode == 1
    assert client.get_bank(name).name == name
    assert json.loads(run("bank", "rm", name, "--memory", address, "--yes", "--json").stdout)["deleted"] == name
    with pytest.raises(kvbank.BankNotFound):
        client.get_bank(name)


def test_banks_are_made_and_changed(run: Run, address: str, client: kvbank.Client) -> None:
    name, memory = uuid.uuid4().hex, ("--memory", address)
    made = run(
        *("bank", "create", name, *memory, "--embedder", EMBEDDER, "--dimension", "4"),
        *("--reader", READER, "--layers", "1,3", "--kv-heads", "2", "--head-dim", "8", "--dtype", "fp16"),
        *("--capacity", "bytes=2GiB", "--policy", "lru", "--target", "80", "--ttl", "30d", "--renew"),
    )
    assert made.returncode == 0
    for words in ("2.0 GiB", "lru, target 80 %", "30d, renewed", READER, "0 chunks"):
        assert words in made.stdout
    bank = client.get_bank(name)
    assert bank.kv == kvbank.KVSpec(READER, (1, 3), 2, 8, "fp16")
    assert bank.capacity == kvbank.Capacity(bytes=2 << 30)
    assert (bank.policy.kind, bank.policy.target) == ("lru", 80)
    assert bank.expiry == kvbank.Expiry(timedelta(days=30), renew=True)

    changes = ("--capacity", "none", "--quota", "chunks=10k,tokens=1M", "--ttl", "never", "--index", "exact")
    changed = json.loads(run("bank", "update", name, *memory, *changes, "--json").stdout)
    assert (changed["capacity"], changed["expiry"], changed["index"]) == (None, None, "exact")
    assert changed["quota"] == {"chunks": 10_000, "tokens": 1_000_000, "bytes": None}
    assert changed["policy"]["kind"] == "lru"
    assert run("bank", "create", name, *memory, "--embedder", EMBEDDER, "--dimension", "4").returncode == 1


def test_metadata_have_the_types_that_were_typed(run: Run, address: str, client: kvbank.Client) -> None:
    name, memory = uuid.uuid4().hex, ("--memory", address)
    typed = ("who=ann", "year=2024", "score=-0.5", "final=true", 'id="7"', "zip=007", "empty=", "eq=a=b")
    options = [word for pair in typed for word in ("--metadata", pair)]
    made = run("bank", "create", name, *memory, "--embedder", EMBEDDER, "--dimension", "4", *options)
    expected = {
        "who": "ann",
        "year": 2024,
        "score": -0.5,
        "final": True,
        "id": "7",
        "zip": "007",
        "empty": "",
        "eq": "a=b",
    }
    found = client.get_bank(name).metadata
    assert {key: (type(value), value) for key, value in found.items()} == {
        key: (type(value), value) for key, value in expected.items()
    }
    for pair in typed:
        assert f"metadata   {pair.replace('=', ' = ', 1)}".rstrip() in made.stdout.splitlines()
    assert json.loads(run("bank", "update", name, *memory, "--metadata", "n=1e3", "--json").stdout)["metadata"] == {
        "n": 1000.0
    }
    assert run("bank", "update", name, *memory, "--metadata", f"n={2**63}").returncode == 1


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--metadata", "year"),
        ("--metadata", "=2024"),
        ("--metadata", "a=1", "--metadata", "a=2"),
        ("--capacity", "12"),
        ("--capacity", "chunks=1,chunks=2"),
        ("--quota", "apples=3"),
        ("--ttl", "soon"),
        ("--ttl", "99999999999d"),
        ("--renew",),
        ("--target", "50"),
        ("--policy", "newest"),
        ("--policy", "lru", "--target", "200"),
        ("--index", "hnsw"),
    ],
)
def test_nonsense_changes_are_usage_errors(run: Run, options: tuple[str, ...]) -> None:
    ended = run("bank", "update", "any", *options)
    assert ended.returncode == 2
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("options", "line"),
    [(("--renew",), "--renew belongs to a --ttl"), (("--target", "50"), "--target belong to a --policy")],
)
def test_options_that_belong_to_another_say_so(run: Run, options: tuple[str, ...], line: str) -> None:
    for words in (("update", "any", "--index", "exact"), ("create", "any", "--embedder", "e", "--dimension", "4")):
        ended = run("bank", *words, *options)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert line in ended.stderr


@pytest.mark.parametrize("figure", ["--dimension", "--kv-heads", "--head-dim"])
def test_figures_that_no_message_holds_are_usage_errors(run: Run, figure: str) -> None:
    ended = run("bank", "create", "b", "--embedder", "e", "--dimension", "4", "--reader", "r", figure, str(2**32))
    assert ended.returncode == 2
    assert run("bank", "evictions", "b", "--explain", "--need", str(2**63)).returncode == 2


def test_a_name_that_is_not_utf8_is_one_line(run: Run, address: str) -> None:
    assert_fails_in_one_line(run("bank", "show", "a\udcff", "--memory", address), "udcff")


def test_evictions(
    run: Run,
    address: str,
    client: kvbank.Client,
    make_bank: Callable[..., str],
    make_chunk: Callable[..., kvbank.NewChunk],
    digests: dict[str, str],
) -> None:
    name, memory = make_bank(capacity=kvbank.Capacity(chunks=10)), ("--memory", address)
    assert "nothing went" in run("bank", "evictions", name, *memory).stdout
    assert "nothing would go" in run("bank", "evictions", name, *memory, "--explain").stdout
    ids = [client.write(name, make_chunk(i), **digests).chunk_id for i in range(10)]
    explained = json.loads(run("bank", "evictions", name, *memory, "--explain", "--json").stdout)
    assert (explained[0]["chunk_id"], explained[0]["reason"], explained[0]["evict_time"]) == (ids[0], "oldest", None)
    client.write(name, make_chunk(10), **digests)
    went = json.loads(run("bank", "evictions", name, *memory, "--json", "--limit", "2").stdout)
    assert len(went) == 2
    shown = run("bank", "evictions", name, *memory).stdout
    assert "oldest" in shown
    assert str(ids[0]) in shown


def test_evictions_that_cannot_be_are_explained(
    run: Run,
    address: str,
    client: kvbank.Client,
    make_bank: Callable[..., str],
    make_chunk: Callable[..., kvbank.NewChunk],
    digests: dict[str, str],
) -> None:
    name = make_bank(capacity=kvbank.Capacity(chunks=1), policy=kvbank.Policy("reject"))
    explain = ("bank", "evictions", name, "--memory", address, "--explain")
    client.write(name, make_chunk(0), **digests)
    assert run(*explain).stdout == (
        "nothing can go: the bank is full: 1 of 1 chunks used, 1 asked for; its policy evicts nothing\n"
    )
    assert json.loads(run(*explain, "--json").stdout) == []
    client.update_bank(name, policy=kvbank.Policy("frequency"))
    assert "1 of 1 chunks would go (1 room)" in run(*explain).stdout


def test_a_name_is_no_markup(run: Run, address: str, client: kvbank.Client) -> None:
    name = f"[red]{uuid.uuid4().hex}[/red]"
    client.create_bank(name, kv=None, embedding=kvbank.EmbeddingSpec("e", 4), metadata={"[b]": "x"})
    assert name in run("bank", "ls", "--memory", address).stdout
    assert "[b] = x" in run("bank", "show", name, "--memory", address).stdout
    client.delete_bank(name)


def test_every_command_and_option_says_what_it_does() -> None:
    """Help says it, and docs/ name every command of the SDK and the server."""
    server = [entry_point for entry_point in entry_points(group="kvbank.commands") if entry_point.name == "server"]
    documents = "".join(path.read_text() for path in (Path(__file__).parents[2] / "docs").glob("*.md"))
    for words, found in commands(server):
        assert found.help, words
        assert " ".join(("kvbank", *words)) in documents, words
        options = [parameter for parameter in found.params if parameter.param_type_name == "option"]
        assert [option.name for option in options if not option.help] == [], words
        if words[0] in ("ping", "bank", "stats", "top"):
            assert "as_json" in [option.name for option in options], words


def test_an_error_is_one_line(run: Run, address: str, unused_port: int) -> None:
    assert_fails_in_one_line(run("bank", "show", "nobody", "--memory", address), "nobody")
    assert_fails_in_one_line(run("ping", f"127.0.0.1:{unused_port}"), "UNAVAILABLE")
    assert_fails_in_one_line(run("ping", "http://host"), "host:port")


def test_usage_errors(run: Run) -> None:
    for arguments in (("ping", "--nothing"), ("brew",), ("bank", "show")):
        assert run(*arguments).returncode == 2


def test_ctrl_c(address: str) -> None:
    """Interrupt a command while it waits for an answer of a server that it has reached, for which it waits 10 s."""
    with closing(Relay(address)) as relay:
        relay.silence("GetServerInfo")
        words = [sys.executable, "-c", "from kvbank.cli import main; main()", "ping", relay.address]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: relay.calls)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_missing_extra_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Find out that a part is there without what it needs, when a command runs."""
    for name in ("sqlalchemy", "memory_service.api.embedded"):
        monkeypatch.setitem(sys.modules, name, None)
    ended = run("ping", str(tmp_path / "folder"))
    assert_fails_in_one_line(ended, "pip install 'kvbank[server]'")


def test_a_part_that_cannot_be_imported_still_shows_its_commands() -> None:
    """Entry points of parts that are not there: each command names the extra."""
    group = "kvbank.commands"
    broken = [EntryPoint(name, f"kvbank_no_{name}.cli:register", group) for name in ("server", "worker")]
    shown = command.run(application(broken), "--help").stdout
    for name, extra in (("serve", "server"), ("chat", "worker"), ("demo", "worker")):
        assert name in shown
        ended = command.run(application(broken), name)
        assert_fails_in_one_line(ended, f"kvbank_no_{extra}", f"pip install 'kvbank[{extra}]'")
