"""All commands, found by walking the tree."""

from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import typer

from kvbank.commands import application

Words = tuple[str, ...]


def commands(parts: Iterable[EntryPoint] | None = None) -> Iterator[tuple[Words, Any]]:
    """Yield every command of the SDK and of `parts`, by default the installed ones, with its words."""
    yield from _below(typer.main.get_command(application(parts)), ())


def _below(command: Any, words: Words) -> Iterator[tuple[Words, Any]]:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, each in command.commands.items():
        yield from _below(each, (*words, name))


def type_of(parameter: Any) -> str:
    """ "int", "Path" and so on, of one value."""
    return str(parameter.bare_type()).removeprefix("list[").removesuffix("]")
