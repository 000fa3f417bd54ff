"""Printed figures are whole, names are cut where they must be, no terminal obeys what is printed, and JSON is JSON."""

import io
import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.cells import cell_len

import kvbank
from kvbank.console.output import one_line, print_json, printable
from kvbank.console.progress import progress
from kvbank.console.table import Column, print_table
from memory_service.api.embedded import LocalServer
from tests.support import command

EMBEDDING = kvbank.EmbeddingSpec("e", 4)
COLUMNS = (Column("name", "name"), Column("chunks"), Column("bytes"), Column("capacity", "word"))
ROWS = [("b" * 300, "1,234,567", "12.5 GiB", "123,456 tokens"), ("[red]宽" * 9, "1", "0 B", "unbounded")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [20, 60, 80, 400])
def test_in_a_terminal_names_are_cut_and_figures_are_not(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(COLUMNS, ROWS, title="T[1]", caption="c")
    lines = shown.getvalue().splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("T[1]", "c", 5)
    for row, line in zip(ROWS, lines[2:4], strict=True):
        name, *figures = row
        assert [figure for figure in figures if figure not in line] == []
        assert name in line if width == 400 else "…" in line and line.startswith(name[:3])
    if width > 50:  # what the figures take, and eight cells of the name
        assert max(map(cell_len, lines[2:])) <= width


def test_in_a_pipe_all_is_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_table(COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for row, line in zip(ROWS, lines[1:], strict=True):
        assert [cell for cell in row if cell not in line] == []


def test_prose_is_wrapped_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"word{i}" for i in range(40)]
    print_table([Column("what", "prose"), Column("measured")], [(" ".join(words), "1,234")])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert [word for word in [*words, "1,234"] if word not in out.split()] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("\u202egnp.\u2066\u200f\u2028", r"\u202egnp.\u2066\u200f\u2028"),
        ("caf\udce9 tag \U000e0041", r"caf\udce9 tag \U000e0041"),
        ("line\nline\ttab", r"line\nline\ttab"),
        ("naïve 宽　space nbsp\xa0 👨‍👩‍👧 می‌روم", "naïve 宽　space nbsp\xa0 👨‍👩‍👧 می‌روم"),
    ],
)
def test_what_a_terminal_obeys_is_escaped_and_what_people_write_is_not(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable("a\nb\tc", keep="\n\t") == "a\nb\tc"
    assert "\n" not in one_line(text * 1000)
    assert len(one_line(text * 1000)) <= 1000


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    value = {
        "nan": float("nan"),
        "of": [float("inf"), 1.5, (True, None)],
        "\x7f\x1b": Path("a\udce9"),
        "t": timedelta(2),
    }
    print_json(value)
    out = capsys.readouterr().out
    assert out.isascii()
    assert out.replace("\n", "").isprintable()
    read = json.loads(out, parse_constant=pytest.fail)
    assert read == {"nan": None, "of": [None, 1.5, [True, None]], "\x7f\x1b": "a\udce9", "t": 172800.0}


def test_progress_takes_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setenv("TERM", "xterm")  # a dumb one is shown no progress
    monkeypatch.setattr(sys, "stderr", shown)
    with progress() as show:
        show("checking a[/b].jsonl \x1b[31m", 1, 2)
        show("of nobody knows how many", 1, None)
        show.say("[bold]said\x07")
    assert "checking a[/b].jsonl \\x1b[31m" in shown.getvalue()
    assert "[bold]said\\x07" in shown.getvalue()


# -- what others wrote ------------------------------------------------------------------------------------------------

ODD = "\x1b[31mred\x1b]0;t\x07 \u202e[b]x[/b]"
NAME = "[b]x[/b]"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with LocalServer(tmp_path_factory.mktemp("data")) as server, kvbank.connect(server.address) as client:
        client.create_bank(NAME, kv=None, embedding=EMBEDDING, metadata={f"key {ODD}": f"value {ODD}"})
        client.create_bank("b" * 200, kv=None, embedding=EMBEDDING)
        yield server.address


def run(*arguments: Any) -> command.Ended:
    return command.run(command.application(), *arguments)


@pytest.mark.parametrize(
    "words",
    [("bank", "ls"), ("bank", "show", NAME), ("bank", "evictions", NAME), ("stats",), ("top", "--interval=0.1")],
)
def test_what_others_wrote_is_shown_and_not_obeyed(address: str, words: tuple[str, ...]) -> None:
    ended = run(*words, "--memory", address)
    assert ended.exit_code == 0, ended.stderr
    assert printable(ended.stdout, keep="\n") == ended.stdout
    if "show" in words:
        assert rf"key {printable(ODD)} = value {printable(ODD)}" in ended.stdout
        answer = json.loads(run(*words, "--memory", address, "--json").stdout)
        assert answer["metadata"] == {f"key {ODD}": f"value {ODD}"}


def test_errors_repeat_nothing_that_is_obeyed(address: str) -> None:
    for words in (("bank", "show", f"{ODD}?"), ("bank", "create", NAME, f"--embedder={ODD}", "--dimension=5"), (ODD,)):
        ended = run(*words, *(["--memory", address] if len(words) > 1 else []))
        assert ended.exit_code in (1, 2)
        assert ended.stderr.count("\n") == 1
        assert printable(ended.stderr, keep="\n") == ended.stderr


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "/dev/null/x"])
def test_a_place_where_no_folder_can_be_made(place: str) -> None:
    ended = run("bank", "ls", "--memory", place)
    assert ended.exit_code == 1
    assert ended.stderr.startswith(f"kvbank: cannot use {place} as data folder: ")
    assert ended.stderr.count("\n") == 1


def test_lists_in_a_pipe_are_whole(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "b" * 200 in run("bank", "ls", "--memory", address).stdout


def test_a_command_of_others_cannot_print_markup() -> None:
    app = typer.Typer()

    @app.command(help="Shows kvbank[extra] and [red]words[/red].")
    def show() -> None:
        raise typer.BadParameter("[red]no[/red] \x1b[31m")

    assert "kvbank[extra] and [red]words[/red]." in command.run(app, "--help").stdout
    assert command.run(app).stderr.startswith(r"kvbank: Invalid value: [red]no[/red] \x1b[31m; see ")
