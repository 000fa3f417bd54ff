"""A conversation in a terminal needs what stands here: clean output, a Ctrl-C that waits, warnings in one line.

The module is light to import: no torch.
"""

import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from kvbank.console import output
from kvbank.console.ending import say


def printable(text: str) -> str:
    """Return the text with everything that a terminal might obey escaped; line ends and tabs stay."""
    return output.printable(text, keep="\n\t")


class Waiting:
    """A line that says how far something is that takes longer than a moment.

    On a terminal the line is written over and goes away at the end; elsewhere there is a new one now and then. The
    object is a context manager; call it with (done, in all).
    """

    FIRST_S, EVERY_S, ON_TERMINAL_S = 2.0, 15.0, 0.5

    def __init__(self, what: str) -> None:
        """Prepare to tell of `what`, a text with `{done}` and `{total}`."""
        self._what, self._shown = what, False
        self._next = time.monotonic() + self.FIRST_S

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() < self._next:
            return
        text = self._what.format(done=f"{done:,}", total=f"{total:,}")
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            say(text)
        self._shown = True
        self._next = time.monotonic() + (self.ON_TERMINAL_S if sys.stderr.isatty() else self.EVERY_S)

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._shown and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def while_loading(what: str) -> Iterator[None]:
    """Say on a terminal, and only there, what is being waited for."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{output.one_line(what)} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Set the event at Ctrl-C, so that no forward is cut in the middle; a second Ctrl-C ends the program."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def interrupted(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Show the worker's own warnings as lines on stderr while the block runs; repeat none that was the last."""
    shown: list[str] = []

    def show(
        message: Any, category: Any, filename: str, lineno: int, file: TextIO | None = None, _: Any = None
    ) -> None:
        text = " ".join(str(message).split())
        if shown[-1:] != [text]:
            say(text)
        shown[:] = [text]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=RuntimeWarning, module="model_worker")
        patched: Callable[..., None] = show
        warnings.showwarning = patched
        yield
