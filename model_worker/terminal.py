"""What a conversation in a terminal needs: clean output, Ctrl-C that waits its turn, warnings in one line."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from kvbank._cli import output
from kvbank._cli.ending import say


def printable(text: str) -> str:
    """Return the text with everything that a terminal might obey escaped; line ends and tabs stay."""
    return output.printable(text, keep="\n\t")


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no forward is cut in the middle; a second one ends the program."""
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
    """The worker's own warnings as lines on stderr; the same one again only after another."""
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
