"""Whether and when a call that failed is made again is decided here. Both clients ask this file; it does no I/O.

A service that restarts is away for seconds. Its callers are to notice nothing but the time, so that a call is repeated
until its deadline, with pauses that grow; a server that was never reached is given up sooner, because its address is
probably wrong. A server that says when to call again is taken at its word.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kvbank._exceptions import DeadlineExceeded, ServiceError
from kvbank._transport.status import NEVER_SENT

# Seconds that a server may take to answer for the first time: longer than a start takes.
FIRST_CONTACT_S = 5.0
# A storage that answers with errors does not mend itself in seconds, but a file may have gone during one answer; a
# server whose database is out of reach says when to call again.
STORAGE_ATTEMPTS = 4
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LAST_PAUSE_S = 0.1, 1.0, 0.05
# Reasons for which the server has done nothing of a call.
_NOT_DONE = ("NOT_SERVING", "RATE_EXCEEDED")


@dataclass(slots=True)
class Contact:
    """Whether a client has ever reached its server (`made`), and the seconds in which it must (`patience`)."""

    patience: float = FIRST_CONTACT_S
    made: bool = False


class Attempts:
    """The attempts at one call, or at one `write_many`, within one deadline."""

    def __init__(self, deadline: float, contact: Contact | None = None) -> None:
        """Begin the attempts at this moment.

        deadline: seconds for all attempts, from now or from the last progress.
        contact: of the client; None where the caller has said how long to wait for a server that was never reached.
        """
        self._deadline = deadline
        self._contact = contact
        self._storage_errors = 0
        # Whether an attempt failed that the server may have done nevertheless.
        self.unsure = False
        self._begin(time.monotonic())

    def remaining(self) -> float:
        """Return the seconds that are left, for the deadline of the next attempt."""
        return max(self._since + self._deadline - time.monotonic(), 0.001)

    def patience(self) -> float:
        """Return the seconds that an acknowledgement may still take. Errors: DeadlineExceeded when there are none."""
        left = self._since + self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"no acknowledgement within {self._deadline} s")
        return left

    def progressed(self, at: float) -> None:
        """Let pauses and deadline count from `at` (time.monotonic()), unless they do so from a later time."""
        if at > self._since:
            self._storage_errors = 0
            self._begin(at)

    def _begin(self, at: float) -> None:
        self._since = at
        self._pauses = _pauses()

    def pause(self, error: ServiceError) -> float:
        """Return the seconds to wait before the next attempt; raise `error` where there is to be none."""
        if error.reason and self._contact is not None:
            self._contact.made = True
        self._storage_errors += error.reason == "STORAGE_ERROR" and error.retry_after is None
        if not error.retryable or self._storage_errors >= STORAGE_ATTEMPTS:
            raise error
        self.unsure = self.unsure or not (error.reason in _NOT_DONE or NEVER_SENT in str(error))
        if error.retry_after is not None:
            return self._as_told(error, error.retry_after)
        # Some of it at random, so that many workers do not come back at one moment.
        pause, left = next(self._pauses) * random.uniform(0.7, 1.3), self._left()
        if left <= _LAST_PAUSE_S:
            raise error
        return min(pause, left / 2)

    def _as_told(self, error: ServiceError, seconds: float) -> float:
        """Return the seconds that the server says, and some more at random, of which each further attempt has more:
        of many callers that are told the same, one is let in."""
        pause = seconds + next(self._pauses) * random.random()
        if pause >= self._left():
            raise error
        return pause

    def _left(self) -> float:
        deadline = self._deadline
        if self._contact is not None and not self._contact.made:
            deadline = min(deadline, self._contact.patience)
        return self._since + deadline - time.monotonic()


def _pauses() -> Iterator[float]:
    pause = _FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(pause * 2, _LONGEST_PAUSE_S)
