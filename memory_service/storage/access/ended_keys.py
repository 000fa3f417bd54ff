"""The removal of API keys that ended long ago. This file owns how long, and how many, keys that were revoked or have
expired stay in the list, so that the list of a tenant that makes and revokes keys all the time does not grow.

The newest key of a store always stays: a store that had a key asks for one for good.
"""

from sqlalchemy import Connection

from memory_service.domain.clock import SECOND
from memory_service.domain.limits import Limits
from memory_service.storage.access.records import Access


class EndedKeys:
    """Removes the keys of an engine that ended long ago."""

    def __init__(self, access: Access, limits: Limits) -> None:
        """Go by `Limits.ended_key_s` and `Limits.ended_keys`."""
        self._access, self._limits = access, limits

    def tidy(self) -> None:
        """Remove the keys whose time is over, a few in each transaction; where there are none, nothing is written."""
        with self._access.records.read() as connection:
            found = self._found(connection)
        while found:
            found = self._access.records.change(self._remove)

    def _remove(self, connection: Connection) -> list[str]:
        """Remove some keys, and return the ids of those that are next."""
        self._access.rows.delete_keys(connection, self._found(connection))
        return self._found(connection)

    def _found(self, connection: Connection) -> list[str]:
        now, limits = self._access.clock.now_us(), self._limits
        before = now - round(limits.ended_key_s * SECOND)
        return self._access.rows.ended_keys(connection, now, before, limits.ended_keys, limits.step_rows)
