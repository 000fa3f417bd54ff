"""What is done in the background, in a thread. Owns the rule that no request waits for clean-up, and that what fails
there is logged and left to the next start."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from memory_service.repeating import Repeating

_log = logging.getLogger(__name__)
_failures = Repeating()


class Janitor:
    """Tasks in the order given, and between them those that come again."""

    def __init__(self, name: str) -> None:
        """`name`: of the thread."""
        self._tasks: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        # [when it is due (monotonic), seconds between two runs, task]
        self._timers: list[tuple[float, float, Callable[[], Any]]] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def later(self, task: Callable[..., Any], *arguments: object) -> None:
        """Once, soon."""
        self._tasks.put(lambda: task(*arguments))

    def every(self, seconds: float, task: Callable[[], Any]) -> None:
        """Again and again, until `close`."""
        self.later(self._timers.append, (time.monotonic() + seconds, seconds, task))

    def rest(self) -> None:
        """Finish what was given and do nothing again; what is given later is still done."""
        rested = threading.Event()
        self.later(self._timers.clear)
        self.later(rested.set)
        rested.wait()

    def close(self) -> None:
        """Finish what was given, for good."""
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
        """Seconds until a timer is due; None without timers."""
        return max(min(due for due, _, _ in self._timers) - time.monotonic(), 0.0) if self._timers else None

    def _do_due(self) -> None:
        for place, (due, seconds, task) in enumerate(list(self._timers)):
            if due <= time.monotonic():
                self._do(task)
                self._timers[place] = (time.monotonic() + seconds, seconds, task)

    @staticmethod
    def _do(task: Callable[[], Any]) -> None:
        try:
            task()
        except Exception as error:
            _failures.error(_log, error, "a task in the background failed")
