"""The removal of sessions that have expired. This file owns that they are removed soon after their time; that none is
answered past it is kept by the reads (`SessionRows.get`, `named`, `newest`)."""

import logging

from memory_service.domain.errors import ServiceError
from memory_service.observe.seldom import Repeating
from memory_service.storage.sessions.records import Sessions

# Sessions of one run, and its transactions that delete turns. The rest is left to the next run, so that the end of the
# service does not wait for all.
_MOST, _STEPS = 1000, 100
_log = logging.getLogger(__name__)


class EndedSessions:
    """Removes sessions that have expired; a thread of its own runs it every second."""

    def __init__(self, sessions: Sessions, step_rows: int) -> None:
        """Remove sessions, so many turns in a transaction."""
        self._sessions, self._step_rows = sessions, step_rows
        self._failures = Repeating()

    def run(self) -> None:
        """Remove what has expired by now, some turns at a time, so that no write waits for all of them."""
        now = self._sessions.clock.now_us()
        with self._sessions.records.read() as connection:
            found = self._sessions.rows.sessions.expired(connection, now, _MOST)
        steps = 0
        for tenant, session_id in found:
            try:
                while self._sessions.expire(tenant, session_id, self._step_rows):
                    if (steps := steps + 1) >= _STEPS:
                        return
            except ServiceError as error:
                self._failures.error(_log, error, "the session %s, which has expired, stays", session_id)
