"""Bars on stderr show how far a command is, where stderr is a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvbank.console.output import one_line


class Progress:
    """A bar for each stage; without bars (no terminal) nothing is shown but what is said."""

    def __init__(self, bars: Any = None) -> None:
        self._bars = bars
        self._stages: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Show that `done` of `total` are done in a stage. total: None where it is not known."""
        if self._bars is None:
            return
        if stage not in self._stages:
            self._stages[stage] = self._bars.add_task(one_line(stage), total=total)
        self._bars.update(self._stages[stage], completed=done, total=total)

    def say(self, text: str) -> None:
        """Print one line on stderr, above the bars."""
        if self._bars is None:
            print(one_line(text), file=sys.stderr)
        else:
            self._bars.console.print(one_line(text), soft_wrap=True)


@contextmanager
def progress(wanted: bool = True) -> Iterator[Progress]:
    """Show bars while the block runs, where they are wanted and stderr is a terminal; they are gone at its end."""
    if not wanted or not sys.stderr.isatty():
        yield Progress()
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}", markup=False), rich.BarColumn(), rich.MofNCompleteColumn())
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, *times, console=console, transient=True) as bars:
        yield Progress(bars)
