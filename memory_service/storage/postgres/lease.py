"""The leases of what only one service does at a time. This file owns that a lease ends by itself where the service that
holds it has ended, that each holder has a higher epoch than those before, and that a service changes nothing more as a
holder when the time of the lease is over: a transaction of a holder begins with a look at the lease, which no other
service can take until that transaction has ended."""

import secrets

from sqlalchemy import Connection

from memory_service.storage.postgres.database import NOW, Database, raw

_FREE = "SELECT 1 FROM leases WHERE name = %(name)s FOR UPDATE SKIP LOCKED"
# Another service may be about to commit that it has taken the lease: whoever believes to have it then learns so from
# `hold`, before it changes anything.
_FIND = "SELECT CASE WHEN holder = %(holder)s THEN epoch ELSE 0 END FROM leases WHERE name = %(name)s"
_TAKE = f"""
    INSERT INTO leases (name, holder, epoch, until) VALUES (%(name)s, %(holder)s, 1, {NOW} + %(period)s)
    ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until,
        epoch = leases.epoch + CASE WHEN leases.holder = excluded.holder THEN 0 ELSE 1 END
    WHERE leases.holder = excluded.holder OR leases.until < {NOW}
    RETURNING epoch
"""
_HOLD = f"""
    SELECT set_config('idle_in_transaction_session_timeout', %(period)s / 1000 || 'ms', true) FROM leases
    WHERE name = %(name)s AND holder = %(holder)s AND epoch = %(epoch)s AND until > {NOW} FOR SHARE
"""


class LeaseLost(Exception):
    """The end of a transaction whose service has the lease no more."""


class Lease:
    """A lease of one name, which this process takes and gives back. By the clock of the database alone."""

    def __init__(self, database: Database, name: str, seconds: float) -> None:
        """Begin without the lease. seconds: for which it is given."""
        self._database = database
        self._given = {"name": name, "holder": secrets.token_hex(8), "period": round(seconds * 1_000_000)}
        self.epoch = 0

    def take(self) -> bool:
        """Take the lease, or renew it, and return whether this process has it now. This waits for no transaction of a
        holder, be it this one's."""
        self.epoch = self._database.change(self._take, durable=False)
        return self.epoch > 0

    def _take(self, connection: Connection) -> int:
        driver = raw(connection)
        free = driver.execute(_FREE, self._given).fetchone()
        # Where it is there and not free, a transaction of its holder is under way: then it stays as it is.
        row = driver.execute(_TAKE if free else _FIND, self._given).fetchone()
        if not free and row is None:
            row = driver.execute(_TAKE, self._given).fetchone()
        return 0 if row is None else int(row[0])

    def hold(self, connection: Connection) -> None:
        """Keep others from the lease until the end of a transaction, which ends by itself where this process stands
        still in it for as long as the lease is given. Errors: LeaseLost."""
        if raw(connection).execute(_HOLD, {**self._given, "epoch": self.epoch}).fetchone() is None:
            raise LeaseLost

    def give_back(self) -> None:
        """Let another process have the lease at once."""
        statement = "UPDATE leases SET until = 0 WHERE name = %(name)s AND holder = %(holder)s"
        self._database.change(lambda connection: raw(connection).execute(statement, self._given), durable=False)
