"""Callers of a server have clients of the memory service here, one for each key.

This file owns the rule that a server (a worker, `kvbank mcp`) has no rights of its own: what a caller may do in the
service is what the caller's key may do there. A key goes to the service as it came, and the server does not look at it.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import kvbank

# What the service takes as a key or token: ASCII without blanks.
_KEY = re.compile(r"[!-~]{1,4096}")


@dataclass(slots=True)
class _Kept:
    """A client, and how many requests use it."""

    client: kvbank.Client
    users: int = 0


class Clients:
    """Clients of the service at `target`, of which the `most` used last stay open."""

    def __init__(self, target: str, *, most: int = 64) -> None:
        self.target, self._most = target, most
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    @contextmanager
    def client(self, key: str) -> Iterator[kvbank.Client]:
        """Yield the client of a key, which stays open at least as long as the block runs. key: "" for none.

        Raises Unauthenticated for what cannot be a key.
        """
        if key and not _KEY.fullmatch(key):
            raise kvbank.Unauthenticated("a key has 1 to 4096 characters of ASCII and no blank")
        kept = self._taken(key)
        try:
            yield kept.client
        finally:
            with self._lock:
                kept.users -= 1
            self._close_spare()

    def _taken(self, key: str) -> _Kept:
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                # As metadata: an `api_key` may also name a file, and callers must not.
                metadata = {"authorization": f"Bearer {key}"} if key else {}
                kept = self._kept[key] = _Kept(kvbank.connect(self.target, metadata=metadata))
            self._kept.move_to_end(key)
            kept.users += 1
            return kept

    def _close_spare(self) -> None:
        """Close clients that are too many and not in use, those that were used longest ago."""
        with self._lock:
            spare = [key for key, kept in self._kept.items() if not kept.users]
            spare = spare[: max(0, len(self._kept) - self._most)]
            closed = [self._kept.pop(key) for key in spare]
        for kept in closed:
            with suppress(kvbank.KVBankError):
                kept.client.close()

    def close(self) -> None:
        """Close the clients of all keys."""
        with self._lock:
            kept = [*self._kept.values()]
            self._kept.clear()
        for each in kept:
            with suppress(kvbank.KVBankError):
                each.client.close()
