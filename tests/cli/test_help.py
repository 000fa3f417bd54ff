"""Every command says what it does and shows an example; what prints data prints it as JSON, too."""

import shlex
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from rich.markup import escape

import kvbank
from kvbank.commands import application
from kvbank.console.help import literal
from tests.cli.tree import Words, commands, type_of
from tests.support import command

# They talk, or serve, and print no data.
WITHOUT_JSON = {("chat",), ("serve",), ("worker",), ("mcp",)}


@pytest.mark.parametrize(("words", "found"), [pytest.param(*each, id=" ".join(each[0])) for each in commands()])
def test_help(words: Words, found: Any) -> None:
    assert found.help
    options = [parameter for parameter in found.params if parameter.param_type_name == "option"]
    assert [option.name for option in options if not option.help] == []
    # Larger ones end in errors of torch, of C and of itertools; the settings of the service check theirs.
    counts = [option for option in options if type_of(option) == "int" and words != ("serve",)]
    assert [option.name for option in counts if option.max is None] == []
    assert words in WITHOUT_JSON or "as_json" in [option.name for option in options]
    example = " ".join(found.help.partition("Example: ")[2].split())
    called = shlex.split(example)
    assert called[: len(words) + 1] == ["kvbank", *words]
    with found.make_context("kvbank", called[len(words) + 1 :]):
        pass  # it can be read


def test_version() -> None:
    assert command.run(application(), "--version").stdout == f"{kvbank.__version__}\n"


@pytest.mark.parametrize(
    "text", ["kvbank[worker] [a][/b]", r"a\[b] x\\[b]", "[B] [,x] [#1] [@x", "[[a]] [a-z]*[.]", "C:\\", "a\\\\"]
)
def test_help_is_escaped_as_rich_does(text: str) -> None:
    assert literal(text) == escape(text)


# Parts that are named and not there.
CLIENT_ALONE = [EntryPoint(name, f"kvbank_no_{name}.cli:register", "kvbank.commands") for name in ("server", "worker")]


def test_the_client_alone_names_what_its_commands_need() -> None:
    shown = command.run(application(CLIENT_ALONE), "--help").stdout
    for part in ("server", "worker"):
        assert f"Needs kvbank[{part}]." in shown
    for words in (["check", "x"], ["check", "--help"], ["serve", "--data", "x", "--insecure"], ["chat", "-s", "x"]):
        ended = command.run(application(CLIENT_ALONE), *words)
        part = "worker" if words[0] == "chat" else "server"
        assert ended == (1, "", f"kvbank: module 'kvbank_no_{part}' is not installed: pip install 'kvbank[{part}]'\n")


def test_all_commands_are_known_to_the_client_alone() -> None:
    alone = {words[0] for words, _ in commands(CLIENT_ALONE)}
    assert alone == {words[0] for words, _ in commands()}


def test_the_help_of_all_commands_loads_nothing_that_only_calls_need() -> None:
    """Ask a new process, which begins with no module; what every command loads at once, each of them waits for."""
    script = """
import sys
from kvbank.commands import application
from typer.main import get_command
get_command(application())
print(*sorted({"numpy", "grpc", "torch", "sqlalchemy", "faiss", "matplotlib"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
