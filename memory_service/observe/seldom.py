"""Log lines that would come again and again, as when a disk is full or broken. This file owns the rule that such a line
is logged once a second, and not with every call."""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

# Seconds between two lines about one kind, and seconds without it after which a kind is new again.
_PAUSE_S, _NEW_AFTER_S = 1.0, 60.0
# Kinds of lines that are remembered.
_MOST_KINDS = 100
# The most characters of the name of a kind.
_LONGEST = 200


class Seen(NamedTuple):
    """Remembers of one kind of line when it came last and was logged last (monotonic, in seconds), and how often it was
    left out since."""

    came: float
    said: float
    left_out: int


class Repeating:
    """Remembers which kinds of lines were logged, and decides which are due; threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing remembered. clock: gives seconds that only go on."""
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[str, Seen] = {}

    def due(self, kind: str) -> bool:
        """Tell whether a line of this kind is to be logged now, and count it."""
        return self._come(kind)[0]

    def error(self, log: logging.Logger, error: BaseException, text: str, *arguments: object) -> None:
        """Log `text` with the error where that is due: with the traceback of an error that is new, else in one line."""
        kind, now = _kind(error), self._clock()
        due, before = self._come(kind)
        if due and now - before.came >= _NEW_AFTER_S:
            log.error(text, *arguments, exc_info=error)
        elif due:
            log.error(f"{text}, again: %s (%d more were not logged)", *arguments, kind, before.left_out)

    def _come(self, kind: str) -> tuple[bool, Seen]:
        """Tell whether a line of this kind is due now, and what was remembered of the kind before."""
        now = self._clock()
        with self._lock:
            before = self._kinds.pop(kind, Seen(-math.inf, -math.inf, 0))
            due = now - before.said >= _PAUSE_S
            self._kinds[kind] = Seen(now, now, 0) if due else Seen(now, before.said, before.left_out + 1)
            if len(self._kinds) > _MOST_KINDS:
                del self._kinds[next(iter(self._kinds))]
        return due, before


def _kind(error: BaseException) -> str:
    """Name the kind of an error, without what differs from call to call: the file, or the statement."""
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    error = getattr(error, "orig", error)
    return f"{type(error).__name__}: {error}"[:_LONGEST]
