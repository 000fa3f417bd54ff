"""The command line in this process: what a command printed, and how it ended."""

import io
import sys
from functools import cache
from typing import Any, NamedTuple, TextIO

import pytest
import typer

from kvbank import commands
from kvbank.console import ending


class Ended(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@cache
def application() -> typer.Typer:
    """Return the application with the commands of all installed parts, made once for all tests of a process."""
    return commands.application()


def run(app: typer.Typer, *arguments: Any, stdin: str | TextIO = "", stdout: io.StringIO | None = None) -> Ended:
    """Run a command of `app`, as the console script does, with `stdin` as its input."""
    input_ = io.StringIO(stdin) if isinstance(stdin, str) else stdin
    streams: dict[str, Any] = {"stdin": input_, "stdout": stdout or io.StringIO(), "stderr": io.StringIO()}
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as end:
            ending.run(app, arguments=[str(argument) for argument in arguments])
    return Ended(int(end.value.code or 0), streams["stdout"].getvalue(), streams["stderr"].getvalue())
