"""Work in the background, in a thread. This file owns the rules that no request waits for clean-up, and that a task
that fails is logged and left to the next start, or, where it recurs, is tried again with a pause that grows."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memory_service.observe.seldom import Repeating
from memory_service.observe.troubles import Troubles

_log = logging.getLogger(__name__)
_failures = Repeating()
# Seconds between two runs of a task that fails, at most.
_LONGEST_PAUSE_S = 60.0


@dataclass(slots=True)
class _Timer:
    """A task that recurs. `due` is the time (monotonic) of its next run; `seconds` are between two runs, and `pause` is
    the same, but longer after failures."""

    task: Callable[[], Any]
    seconds: float
    due: float
    pause: float


class Janitor:
    """Runs tasks in the order in which they were given, and between them those that recur."""

    def __init__(self, name: str, troubles: Troubles) -> None:
        """Begin the thread of this janitor. name: that of the thread. troubles: where the failure of a task that recurs
        is noted."""
        self._name = name
        self._troubles = troubles
        self._tasks: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._timers: list[_Timer] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def later(self, task: Callable[..., Any], *arguments: object) -> None:
        """Run a task once, after those that were given before it."""
        self._tasks.put(lambda: task(*arguments))

    def every(self, seconds: float, task: Callable[[], Any]) -> None:
        """Run a task every so many seconds, until `rest` or `close`."""
        self.later(self._timers.append, _Timer(task, seconds, time.monotonic() + seconds, seconds))

    def settle(self) -> None:
        """Return when the tasks that were given so far have run."""
        settled = threading.Event()
        self.later(settled.set)
        settled.wait()

    def rest(self) -> None:
        """Finish the tasks that were given, and end those that recur. Tasks that are given later still run."""
        self.later(self._timers.clear)
        self.settle()

    def close(self) -> None:
        """Finish the tasks that were given, and end the thread."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=self._pause())
            except queue.Empty:
                pass
            else:
                if task is None:
                    return
                self._do(task)
            self._do_due()

    def _pause(self) -> float | None:
        """Return the seconds until a timer is due; None without timers."""
        return max(min(timer.due for timer in self._timers) - time.monotonic(), 0.0) if self._timers else None

    def _do_due(self) -> None:
        for timer in list(self._timers):
            if timer.due > time.monotonic():
                continue
            error, name = self._do(timer.task), f"{self._name} {getattr(timer.task, '__name__', '')}"
            if error is None:
                self._troubles.end(name)
                timer.pause = timer.seconds
            else:
                self._troubles.begin(name, f"{type(error).__name__}: {error}")
                timer.pause = min(2 * timer.pause, max(_LONGEST_PAUSE_S, timer.seconds))
            timer.due = time.monotonic() + timer.pause

    @staticmethod
    def _do(task: Callable[[], Any]) -> Exception | None:
        try:
            task()
        except Exception as error:
            _failures.error(_log, error, "a task in the background failed")
            return error
        return None
