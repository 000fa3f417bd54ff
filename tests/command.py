"""The command line in this process: what a command printed, and how it ended."""

import io
import sys
from typing import Any, NamedTuple

import pytest
import typer

from kvbank._cli import ending


class Ended(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def run(app: typer.Typer, *arguments: Any, stdin: str = "") -> Ended:
    """Run a command of `app`, as the console script does, with `stdin` as its input."""
    streams = {"stdin": io.StringIO(stdin), "stdout": io.StringIO(), "stderr": io.StringIO()}
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as end:
            ending.run(app, arguments=[str(argument) for argument in arguments])
    return Ended(int(end.value.code or 0), streams["stdout"].getvalue(), streams["stderr"].getvalue())
