"""What comes again and again, as from a disk that is full or broken: said once a second, and not with every call."""

import logging
import math
import threading
import time
from typing import NamedTuple

# Between two lines about one kind; after the second time a kind is new again.
_PAUSE_S, _NEW_AFTER_S = 1.0, 60.0
# Of which something is remembered.
_MOST_KINDS = 100
_LONGEST = 200


class Seen(NamedTuple):
    """Of one kind: when it came last and was said last (monotonic), and how often it was left out since."""

    came: float
    said: float
    left_out: int


class Repeating:
    """Remembers what was said; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[str, Seen] = {}

    def due(self, kind: str) -> bool:
        """Whether to say it now."""
        return self._come(kind)[0]

    def error(self, log: logging.Logger, error: BaseException, text: str, *arguments: object) -> None:
        """Log `text` with the error, if it is due: with its traceback where it is new, else in one line."""
        kind, now = _kind(error), time.monotonic()
        due, before = self._come(kind)
        if due and now - before.came >= _NEW_AFTER_S:
            log.error(text, *arguments, exc_info=error)
        elif due:
            log.error(f"{text}, again: %s (%d more were not logged)", *arguments, kind, before.left_out)

    def _come(self, kind: str) -> tuple[bool, Seen]:
        """Whether to say it now, and what was before."""
        now = time.monotonic()
        with self._lock:
            before = self._kinds.pop(kind, Seen(-math.inf, -math.inf, 0))
            due = now - before.said >= _PAUSE_S
            self._kinds[kind] = Seen(now, now, 0) if due else Seen(now, before.said, before.left_out + 1)
            if len(self._kinds) > _MOST_KINDS:
                del self._kinds[next(iter(self._kinds))]
        return due, before


def _kind(error: BaseException) -> str:
    """Without what differs from call to call: the file, or the statement."""
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    error = getattr(error, "orig", error)
    return f"{type(error).__name__}: {error}"[:_LONGEST]
