"""A call of a tool gets the client with which it asks the memory service here.

This file owns the rule that several programs may use one data folder, although one process at a time owns it: a folder
is open while calls run, and is let go of then. A call that finds it taken waits.
"""

import random
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import kvbank

# Returns the client for a caller's key ("" for none), for the time of a block.
Store = Callable[[str], AbstractContextManager[kvbank.Client]]

# Seconds for which a call waits for a folder that another process has without letting go of it, and so many times as
# long for a folder that is let go of and taken by others all the time.
PATIENCE_S, _MOST_HOLDERS = 30.0, 10
# Seconds between two looks, at first and at most: a look takes about as much as a call of the other process.
_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


def of_service(client: kvbank.Client) -> Store:
    """Return the store behind one client, which all calls use."""
    return lambda key: nullcontext(client)


class Folder:
    """The store in a data folder, which is served in this process while calls run. patience: see `PATIENCE_S`."""

    def __init__(self, path: Path, patience: float = PATIENCE_S) -> None:
        self._path, self._patience = path, patience
        self._lock, self._users = threading.Lock(), 0
        self._client: Future[kvbank.Client] | None = None

    @contextmanager
    def __call__(self, key: str) -> Iterator[kvbank.Client]:
        """Yield a client of the folder. key: not looked at, since a process that opens a folder owns that folder.

        Raises Unavailable where another process has the folder all the time.
        """
        client = self._taken()
        try:
            yield client.result()
        finally:
            self._let_go()

    def _taken(self) -> "Future[kvbank.Client]":
        """Return the client that the calls of now share; the first of them opens it, and the others wait with it."""
        with self._lock:
            self._users += 1
            if self._client is not None:
                return self._client
            client = self._client = Future()
        try:
            client.set_result(self._opened())
        except BaseException as error:
            with self._lock:
                self._client = None  # the next call tries again
            client.set_exception(error)
        return client

    def _let_go(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._client is not None:
                client, self._client = self._client, None
                client.result().close()

    def _opened(self) -> kvbank.Client:
        begun, pause = time.monotonic(), _PAUSE_S
        since, taken = "", begun
        while True:
            try:
                return kvbank.connect(self._path)
            except kvbank.Unavailable as error:
                if error.reason != "FOLDER_IN_USE":
                    raise
                now = time.monotonic()
                if error.metadata["since"] != since:
                    since, taken = error.metadata["since"], now
                if now > taken + self._patience or now > begun + _MOST_HOLDERS * self._patience:
                    raise _kept(self._path, error) from None
            time.sleep(pause * random.uniform(0.5, 1))  # not always when the other process has it again
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _kept(path: Path, error: kvbank.Unavailable) -> kvbank.Unavailable:
    """Return the error of a folder that another process keeps, with what to do."""
    return kvbank.Unavailable(
        f"{error}. To use it from several programs, serve it to all (kvbank serve --data {shlex.quote(str(path))} "
        "--listen 127.0.0.1:7400) and start each with --memory 127.0.0.1:7400",
        reason=error.reason,
    )
