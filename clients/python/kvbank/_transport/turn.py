"""Several addresses of one service: whose turn it is. This file owns the order: calls go to one address for as long as
it answers, and when it does not, to the next.

gRPC's own lists (`ipv4:A,B`) take no names, resolve none anew, and check one name for all certificates; so each address
has a channel of its own, and the calls that are made again are made to the next.
"""

import threading
from collections.abc import Sequence

# The most milliseconds of an attempt to connect to one of several addresses, in which nothing answers; gRPC waits
# longer for a single one.
CONNECT_MS = 2_000


class Turn:
    """Says to which of a client's addresses a call goes; threads and channels share it."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(addresses)
        self.at = 0
        self._lock = threading.Lock()

    def leave(self, at: int) -> None:
        """Go on to the next address, where it is still the turn of this one: of many calls that fail at once, one moves
        all."""
        with self._lock:
            if at == self.at:
                self.at = (at + 1) % len(self.addresses)
