"""A task of several calls is a generator, which yields what to call and is sent the answer; it is run here. Both
clients run the same generators."""

from collections.abc import Callable, Generator
from typing import Generic, TypeVar

from kvbank._exceptions import ServiceError

CallT = TypeVar("CallT")
AnswerT = TypeVar("AnswerT")
T = TypeVar("T")


class Run(Generic[CallT, AnswerT, T]):
    """A run of steps. Each method returns the call to make next, or None at the end, when there is a `result`."""

    result: T

    def __init__(self, steps: Generator[CallT, AnswerT, T]) -> None:
        self._steps = steps

    def begin(self) -> CallT | None:
        """Return the first call."""
        return self._resumed(lambda: next(self._steps))

    def answered(self, answer: AnswerT) -> CallT | None:
        """Take the answer to the call, and return what to do next."""
        return self._resumed(lambda: self._steps.send(answer))

    def failed(self, error: ServiceError) -> CallT | None:
        """Take the error in which the call ended, and return what to do next; raise it where the steps cannot go on."""
        return self._resumed(lambda: self._steps.throw(error))

    def _resumed(self, resume: Callable[[], CallT]) -> CallT | None:
        try:
            return resume()
        except StopIteration as end:
            self.result = end.value
            return None
