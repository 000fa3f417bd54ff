"""Whatever a command is given, it ends in an exit code that is documented and at most a few lines, and loses nothing.

Commands are found by walking the tree, so that a new one is covered by itself. Every command is given odd folders,
names, values for each of its options by their type, encodings and streams; models and adapters that are broken; and a
service that is away. A command that works on is interrupted, as with Ctrl-C.
"""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvbank
from kvbank.console.ending import FAILED, INTERRUPTED, READER_LEFT, USAGE
from kvbank.console.output import printable
from memory_service.api.embedded import LocalServer
from memory_service.care.backup import backup
from model_worker.session.unanswered import Unanswered
from tests.cli import odd
from tests.cli.tree import Words, commands, type_of
from tests.cli.zygote import Call, Ended, Zygote
from tests.worker_session.conftest import save_model

ASSETS = Path(__file__).parents[2] / "model_worker" / "assets"
TYPED = (
    b"ahoy\nsecond [red]line[/red]\n",
    b"",
    b"caf\xe9 \xff\n\n/help\n/sing\n",
    b"\x1b[31m\x00\n",
    "closed",
    "/dev/zero",
)
STREAMS = ("kept", "kept", "kept", "full", "closed", "left")
ENCODINGS = ("utf-8", "utf-8", "ascii", "latin-1", "utf-16")


class World:
    """What commands are run in: things that are whole, by the names of the options that take them, and odd ones."""

    def __init__(self, place: Path, address: str) -> None:
        self.place, self.address = place, address
        self.model = save_model(place / "model", 1)
        self.text = place / "text.txt"
        self.text.write_text("The sea is wide. It was never crossed by anyone in winter.\n" * 900)
        self.paths = odd.folders(place)
        self.models = odd.models(self.model, place)
        self.adapters = odd.adapters(ASSETS / "kvbank-small-icae", place)
        self._store, self._backup = place / "store", place / "backup"
        _fill(self._store)
        backup(self._store, self._backup)
        self._made = 0

    def whole(self, words: Words, name: str, type_: str) -> str | None:
        """Return a value for an option or argument with which its command works; None to leave it out where that may
        be."""
        if name == "data" and type_ == "Path":
            return str(self.text) if words[0] == "train" else str(shutil.copytree(self._store, self.new()))
        values: dict[str, Any] = {
            "model": self.model,
            "memory": self.address,
            "target": self.address if type_ == "str" else None,
            "listen": "127.0.0.1:0",
            "text": self.text,
            "name": "sea" if words[0] == "session" else "bank",
            "embedder": "e",
            "dimension": 4,
            "source": self._backup,
            **{"which": "sea", "turn": 1, "turns": "1", "chunk_id": 1, "paths": self.text, "role": "read"},
            "quota": "chunks=5" if words[0] == "tenant" else None,
            "embed": "lexical" if words[0] == "reembed" else None,
            **dict.fromkeys(("place", "out", "path"), self.new()),
        }
        found = values.get(name)
        return None if found is None else str(found)

    def new(self) -> Path:
        """Return a path that is not there."""
        self._made += 1
        return self.place / f"made-{self._made}"

    def odd(self, name: str, type_: str) -> list[str]:
        """Return values for an option or argument that no person would give on purpose."""
        if type_ == "int":
            return list(odd.INTEGERS)
        if type_ == "float":
            return list(odd.FLOATS)
        if type_ == "Path":
            return self.paths
        special = {"model": self.models, "adapter": self.adapters, "memory": self.paths}.get(name, [])
        return [*special, *special, *odd.TEXTS]


def _fill(folder: Path) -> None:
    with kvbank.connect(folder) as client:
        client.create_bank("bank", kv=None, embedding=kvbank.EmbeddingSpec("e", 4), metadata={"\x1b[31m": "\u202e"})
        client.write(
            "bank",
            kvbank.NewChunk(np.eye(4, dtype=np.float32)[0], text="a\x1b]0;b"),
            embedder_digest="e",
            reader_digest="",
        )
        sea = client.sessions.create(name="sea", metadata={"\x1b[31m": "\u202e"})
        lease = client.sessions.acquire(sea.session_id, "test").lease
        assert lease is not None
        turn = kvbank.Turn([kvbank.Item("user", "a\x1b]0;b\u202e"), kvbank.Item("\x9b", "", '{"a": "\x1b"}')], [1])
        client.sessions.append(sea.session_id, [turn, kvbank.Turn()], epoch=lease.epoch, follows=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = tmp_path_factory.mktemp("world")
    _fill(place / "served")
    with LocalServer(place / "served") as server:
        yield World(place, server.address)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as process:
        yield process


def made_of(world: World, words: Words, command: Any, choose: random.Random, odd_one: Any) -> list[str]:
    """Return the arguments of a call in which `odd_one` of its parameters has an odd value, and all others work."""
    options, arguments = [], []
    for parameter in command.params:
        is_option, type_ = parameter.param_type_name == "option", type_of(parameter)
        if type_ == "bool":
            likely = 0.5 if parameter.name in ("as_json", "yes", "once") else 0.15
            options += [parameter.opts[0]] if choose.random() < likely else []
            continue
        value = world.whole(words, parameter.name, type_)
        if parameter is odd_one or (value is None and parameter.required):
            value = choose.choice(world.odd(parameter.name, type_))
        if value is None:
            continue
        if is_option:
            options.append(f"{parameter.opts[0]}={value}")
        else:
            arguments.append(value)
    # Behind "--" no argument is taken for an option; sometimes it may be.
    return [*words, *options, *(["--"] if choose.random() < 0.8 else []), *arguments]


def calls(world: World, choose: random.Random, each: int, every: int) -> Iterator[Call]:
    """Yield calls of commands: `each` with an odd value, half of them with odd streams. every: 1 for all commands, n
    for each n-th one."""
    for words, command in list(commands())[::every]:
        values = [parameter for parameter in command.params if type_of(parameter) != "bool"]
        for number in range(each):
            arguments = made_of(world, words, command, choose, choose.choice([*values, None]))
            call = Call(arguments, stdin=choose.choice(TYPED[:3]))
            if number % 2:
                call = replace(
                    call,
                    stdin=choose.choice(TYPED),
                    stdout=choose.choice(STREAMS),
                    stderr=choose.choice(STREAMS),
                    encoding=choose.choice(ENCODINGS),
                    environment={"COLUMNS": choose.choice(["20", "80", "x"]), "LANG": choose.choice(["C", "C.UTF-8"])},
                )
            yield call


def check(call: Call, ended: Ended, world: World) -> None:
    """Fails where a person would be left with a traceback, a riddle, or less than was typed."""
    encoding = call.encoding
    out, err = (data.decode(encoding, errors="replace") for data in (ended.stdout, ended.stderr))
    assert ended.code in (0, FAILED, USAGE, INTERRUPTED, READER_LEFT), ended
    assert ended.code != INTERRUPTED or ended.interrupted
    assert "Traceback" not in out + err
    lines = err.splitlines()
    assert len(lines) <= 4 or call.arguments[0] == "serve", err  # a server logs
    for text in (out, *lines):
        assert printable(text, keep="\n\t") == text
    if ended.code and not ended.interrupted and call.stderr == "kept" and ended.code != READER_LEFT:
        assert (lines and lines[-1].startswith("kvbank: ")) or out, "it does not say why"
    if "--json" in call.arguments and ended.code == 0 and call.stdout == "kept" and out:
        json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    if call.arguments[0] == "chat" and f"--memory={world.address}" in call.arguments and "> ahoy" in out:
        assert "ahoy" in _kept(call, world.address), "what was typed is lost"


def _kept(call: Call, address: str) -> list[str]:
    """Return everything that was ever said in the sessions of a service, answered or not."""
    kept: list[str] = []
    with kvbank.connect(address) as client:
        for session in client.sessions.list():
            kept += [turn.text("user") for turn in client.sessions.turns(session.session_id)]
            kept += Unanswered(session.session_id).messages()
    return kept


@pytest.mark.parametrize("seed", [0])
def test_every_command_ends_as_it_should(world: World, zygote: Zygote, seed: int) -> None:
    """Samples are tried here; the slow test below tries much more."""
    _try(world, zygote, random.Random(seed), each=1, every=4, seconds=0.3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 4))
def test_every_command_ends_as_it_should_whatever_it_is_given(world: World, zygote: Zygote, seed: int) -> None:
    _try(world, zygote, random.Random(seed), each=12, every=1, seconds=2.0)


def _try(world: World, zygote: Zygote, choose: random.Random, each: int, every: int, seconds: float) -> None:
    wrong = []
    for call in calls(world, choose, each, every):
        ended = zygote.run(replace(call, seconds=seconds))
        try:
            check(call, ended, world)
        except (Exception, pytest.fail.Exception) as error:
            wrong.append(f"{error!r}\n  {call}\n  {ended}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
