"""What a conversation in a terminal needs: clean output, Ctrl-C that waits its turn, warnings in one line."""

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO


def printable(text: str) -> str:
    """The text with everything that a terminal might obey replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


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
            print(f"kvbank: {text}", file=sys.stderr)
        shown[:] = [text]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=RuntimeWarning, module="model_worker")
        patched: Callable[..., None] = show
        warnings.showwarning = patched
        yield
