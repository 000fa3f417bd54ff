"""Who does what only one service needs to do. This file owns that a lease ends by itself where its holder has ended,
and that each holder has a higher epoch than those before."""

import secrets

from sqlalchemy import Connection

from memory_service.storage.postgres.database import Database, raw

# Seconds for which a lease is given, unless its user says otherwise; it is renewed every second.
_SECONDS = 10
_TAKE = """
    INSERT INTO leases (name, holder, epoch, until)
    VALUES (%(name)s, %(holder)s, 1, (extract(epoch FROM clock_timestamp()) * 1000000)::int8 + %(period)s)
    ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until,
        epoch = leases.epoch + CASE WHEN leases.holder = excluded.holder THEN 0 ELSE 1 END
    WHERE leases.holder = excluded.holder OR leases.until < (extract(epoch FROM clock_timestamp()) * 1000000)::int8
    RETURNING epoch
"""


class Lease:
    """A lease of one name, which this process takes and gives back. By the clock of the database alone."""

    def __init__(self, database: Database, name: str, seconds: float = _SECONDS) -> None:
        """Begin without the lease. seconds: for which it is given."""
        self._database = database
        self._given = {"name": name, "holder": secrets.token_hex(8), "period": round(seconds * 1_000_000)}
        self.epoch = 0

    def take(self) -> bool:
        """Take the lease, or renew it, and return whether this process has it now."""
        self.epoch = self._database.change(self._take, durable=False)
        return self.epoch > 0

    def _take(self, connection: Connection) -> int:
        row = raw(connection).execute(_TAKE, self._given).fetchone()
        return 0 if row is None else int(row[0])

    def give_back(self) -> None:
        """Let another process have the lease at once."""
        statement = "UPDATE leases SET until = 0 WHERE name = %(name)s AND holder = %(holder)s"
        self._database.change(lambda connection: raw(connection).execute(statement, self._given), durable=False)
