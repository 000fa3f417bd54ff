"""All commands, found by walking the tree."""

from collections.abc import Iterator
from typing import Any

import typer

from kvbank.console.application import application

Words = tuple[str, ...]


def commands() -> Iterator[tuple[Words, Any]]:
    """Every command of the installed parts with its words."""
    yield from _below(typer.main.get_command(application()), ())


def _below(command: Any, words: Words) -> Iterator[tuple[Words, Any]]:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, each in command.commands.items():
        yield from _below(each, (*words, name))


def type_of(parameter: Any) -> str:
    """ "int", "Path" and so on, of one value."""
    return str(parameter.bare_type()).removeprefix("list[").removesuffix("]")
