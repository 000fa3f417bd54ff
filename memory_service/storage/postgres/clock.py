"""The time of a service that shares its store with others. This file owns that all of them go by the clock of the
database, within the time of a message to it; and that the time of the store never goes back, also where the clock of
the database is set back: the store keeps a mark.

A service begins by the clock of the database and goes on by a clock of its machine that cannot be set. Since those of
two machines drift apart by seconds a week, the latter is steered: it goes a little faster or slower until it agrees.
"""

from collections.abc import Callable

from sqlalchemy import Connection

from memory_service.domain.clock import MARK_US, Clock, Mark, Timepieces, machine
from memory_service.storage.postgres.database import NOW, Database, raw

_ASK = f"SELECT {NOW}"
_FIND = "SELECT now, running, boot FROM clock"
_SAVE = """
    INSERT INTO clock VALUES (1, %s, %s, %s) ON CONFLICT (id)
    DO UPDATE SET now = excluded.now, running = excluded.running, boot = excluded.boot WHERE clock.now < excluded.now
"""


# In parts of a million: how much faster or slower a clock goes at most. In microseconds: the time in which a difference
# is made up for, where that is fast enough.
_MOST_STEERED, _MADE_UP_US = 500, 10_000_000


class Steered:
    """A clock in microseconds that follows one of the machine, a little faster or slower. It never goes back. One
    thread steers it, and any thread reads it."""

    def __init__(self, running: Callable[[], int]) -> None:
        """Begin at the time, and with the speed, of a clock that cannot be set."""
        self._running = running
        begin = running()
        # Since when by the clock below, what was shown then, and how much faster it goes since (parts of a million).
        self._state = begin, begin, 0

    def now(self) -> int:
        """Return the time that the clock shows."""
        since, shown, faster = self._state
        passed = self._running() - since
        return shown + passed + passed * faster // 1_000_000

    def steer(self, behind: int) -> None:
        """Go on at a speed that makes up for a difference. behind: by how many microseconds the clock is behind,
        negative where it is ahead."""
        since, shown, faster = self._state
        passed = (now := self._running()) - since
        shown += passed + passed * faster // 1_000_000
        faster = behind * 1_000_000 // _MADE_UP_US
        self._state = now, shown, max(-_MOST_STEERED, min(_MOST_STEERED, faster))


class StoreClock:
    """Keeps the clock of a service in step with its store.

    clock: the clock to go by.
    """

    def __init__(self, database: Database, given: Clock | None, pieces: Timepieces | None = None) -> None:
        """Go on from the mark of the store. given: the clock to go by, None for that of the database. pieces: the
        clocks to read, those of this machine unless others are given."""
        self._database = database
        self._steered: Steered | None = None
        self._marked = 0
        found = database.one(_FIND)
        mark = None if found is None else Mark(*found)
        if given is not None:
            self.clock = given
            given.resume(mark)
        else:
            read = pieces or machine()
            ahead, _ = min((self._ahead(read.wall) for _ in range(3)), key=lambda measured: measured[1])
            self._steered = Steered(read.running)
            self.clock = Clock(Timepieces(lambda: read.wall() + ahead, self._steered.now, read.boot))
            # Of a service whose clock is that of the database too: no pause lies between its mark and this start.
            self.clock.resume(None if mark is None else mark._replace(now=mark.now - MARK_US, boot=""))
        self.keep_mark()

    def _ahead(self, clock: Callable[[], int]) -> tuple[int, int]:
        """Measure by how many microseconds the clock of the database is ahead of another one, and return by how many
        this may be wrong, too."""
        before = clock()
        row = self._database.one(_ASK)
        after = clock()
        assert row is not None
        return int(row[0]) - (before + after) // 2, (after - before) // 2

    def _steer(self, steered: Steered) -> None:
        """Let the clock come nearer to that of the database."""
        behind, doubt = self._ahead(self.clock.now_us)
        steered.steer(behind if abs(behind) > doubt else 0)

    def keep_mark(self) -> None:
        """Let the store know the time, and follow the clock of the database. Call this every second."""
        if self._steered is not None:
            self._steer(self._steered)
        mark = self.clock.mark()

        def save(connection: Connection) -> None:
            raw(connection).execute(_SAVE, tuple(mark))

        if mark.now - self._marked >= MARK_US:
            self._database.change(save, durable=False)
            self._marked = mark.now
