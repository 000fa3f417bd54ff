"""A question whose answer may be long in coming, or not come at all."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Patience(Generic[T]):
    """Asks a question in a thread of its own, and goes on without the answer where that is late. There is one such
    thread at a time: who asks while an earlier question waits for its answer gets that one. Threads share it."""

    def __init__(self, question: Callable[[], T], seconds: float, name: str) -> None:
        """Begin without a question under way. question: what is called; it may block for any time. seconds: for which
        an answer is waited for. name: that of the thread."""
        self._question, self._seconds, self._name = question, seconds, name
        self._lock = threading.Lock()
        self._asked: Future[T] | None = None

    def answer(self) -> T | None:
        """Return the answer, or None where it does not come in time. Errors: those of the question."""
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = Future()
                # A daemon, so that a question without an answer keeps no process from its end.
                threading.Thread(target=self._ask, args=(self._asked,), name=self._name, daemon=True).start()
            asked = self._asked
        try:
            return asked.result(self._seconds)
        except TimeoutError:
            # It may have come just now, or be an error of the same kind by which the question ends.
            return asked.result() if asked.done() else None

    def _ask(self, asked: "Future[T]") -> None:
        try:
            asked.set_result(self._question())
        except BaseException as error:
            asked.set_exception(error)
