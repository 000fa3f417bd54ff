"""The time of a service that shares its store with others. This file owns that all of them begin by the clock of the
database, within the time of a message to it, and go on by clocks that cannot be set; and that the time of the store
never goes back, also where the clock of the database is set back: the store keeps a mark.
"""

import time

from sqlalchemy import Connection

from memory_service.domain.clock import MARK_US, Clock, Mark, Timepieces, machine
from memory_service.storage.postgres.database import Database, raw

_ASK = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::int8"
_FIND = "SELECT now, running, boot FROM clock"
_SAVE = """
    INSERT INTO clock VALUES (1, %s, %s, %s) ON CONFLICT (id)
    DO UPDATE SET now = excluded.now, running = excluded.running, boot = excluded.boot WHERE clock.now < excluded.now
"""


class StoreClock:
    """Keeps the clock of a service in step with its store.

    clock: the clock to go by.
    """

    def __init__(self, database: Database, given: Clock | None) -> None:
        """Go on from the mark of the store. given: the clock to go by, None for that of the database."""
        self._database = database
        self._marked = 0
        found = database.one(_FIND)
        mark = None if found is None else Mark(*found)
        if given is not None:
            self.clock = given
            given.resume(mark)
        else:
            ahead = self._ahead()
            pieces = machine()
            self.clock = Clock(Timepieces(lambda: pieces.wall() + ahead, pieces.running, pieces.boot))
            # Of a service whose clock is that of the database too: no pause lies between its mark and this start.
            self.clock.resume(None if mark is None else mark._replace(now=mark.now - MARK_US, boot=""))
        self.keep_mark()

    def _ahead(self) -> int:
        """Measure by how many microseconds the clock of the database is ahead of that of this machine."""
        best, ahead = None, 0
        for _ in range(3):
            before = time.time_ns() // 1000
            row = self._database.one(_ASK)
            after = time.time_ns() // 1000
            if row is not None and (best is None or after - before < best):
                best, ahead = after - before, int(row[0]) - (before + after) // 2
        return ahead

    def keep_mark(self) -> None:
        """Let the store know the time. Call this every second."""
        mark = self.clock.mark()

        def save(connection: Connection) -> None:
            raw(connection).execute(_SAVE, tuple(mark))

        if mark.now - self._marked >= MARK_US:
            self._database.change(save, durable=False)
            self._marked = mark.now
