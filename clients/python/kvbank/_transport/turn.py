"""Several addresses of one service: whose turn it is. This file owns the order: calls go to one address for as long as
it answers, and when it does not, to the next; or, where they are spread, to all that answer, one after the other.

gRPC's own lists (`ipv4:A,B`) take no names, resolve none anew, and check one name for all certificates; so each address
has a channel of its own, and the calls that are made again are made to the next.
"""

import random
import threading
import time
from collections.abc import Sequence

# The most milliseconds of an attempt to connect to one of several addresses, in which nothing answers; gRPC waits
# longer for a single one.
CONNECT_MS = 2_000
# Seconds for which calls that are spread leave out an address that did not answer: at first, and at most. Each further
# failure doubles them, because what asks there again may wait as long as an attempt to connect.
FIRST_AWAY_S, LONGEST_AWAY_S = 1.0, 60.0


class Turn:
    """Says to which of a client's addresses a call goes; threads and channels share it."""

    def __init__(self, addresses: Sequence[str], *, spread: bool = False) -> None:
        """Begin with the first address, or, where calls are spread, with any: many clients begin at one moment."""
        self.addresses = tuple(addresses)
        self._spread = spread
        self._at = random.randrange(len(self.addresses)) if spread else 0
        # Address -> until when (time.monotonic()) it is left out, and for how long it was.
        self._away: dict[int, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def take(self) -> int:
        """Return the place of the address to which a call goes now."""
        if len(self.addresses) == 1:
            return 0
        with self._lock:
            if not self._spread:
                return self._at
            at = self._first_present()
            self._at = self._after(at)
            return at

    def leave(self, at: int) -> None:
        """Go on to the next address, where it is still the turn of this one: of many calls that fail at once, one moves
        all. Calls that are spread leave this one out for a while."""
        with self._lock:
            if self._spread:
                until, pause = self._away.get(at, (0.0, FIRST_AWAY_S / 2))
                if (now := time.monotonic()) >= until:
                    pause = min(2 * pause, LONGEST_AWAY_S)
                    self._away[at] = now + pause, pause
            elif at == self._at:
                self._at = self._after(at)

    def answered(self, at: int) -> None:
        """Note that an address answers."""
        if at in self._away:
            with self._lock:
                self._away.pop(at, None)

    def _first_present(self) -> int:
        """Return the next address that is not left out; where all are, the next one."""
        now, at = time.monotonic(), self._at
        for _ in self.addresses:
            if self._away.get(at, (0.0, 0.0))[0] <= now:
                return at
            at = self._after(at)
        return at

    def _after(self, at: int) -> int:
        return (at + 1) % len(self.addresses)
