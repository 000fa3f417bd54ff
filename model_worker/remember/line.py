"""The line of a memory: a thread that waits for the service while the model goes on.

This file owns the rule of order: what is handed over is done one after the other, and a caller that is about to speak
to the service itself lets all of that be done first. So the service hears everything in the order in which the model
came to it, whichever thread speaks, and what is recalled does not depend on which of them was quicker.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Line:
    """Work of one memory that another thread does, in order. Its thread is started for the first work, and ends
    when nothing refers to the line any more."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[Any] | None = None
        self._own: list[int] = []  # identity of the thread

    def begin(self, work: Callable[[], T]) -> "Future[T]":
        """Let the thread do some work behind all that it has, and return what will have its result or its error.

        No gradient is kept of the work.
        """
        if self._thread is None:
            # No method of this object: a thread that knew it would never end, since it ends with this object.
            self._thread = ThreadPoolExecutor(1, "kvbank-memory", initializer=partial(_note, self._own))
        self._last = made = self._thread.submit(torch.no_grad()(work))
        return made

    def wait(self) -> None:
        """Wait until all work is done, however it ends. Work that is done in the thread itself waits for nothing."""
        last = self._last
        if last is not None and threading.get_ident() not in self._own:
            wait([last])
            self._last = None


def _note(thread: list[int]) -> None:
    thread.append(threading.get_ident())
