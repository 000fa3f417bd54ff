"""What the database says of the objects in the bucket, for their clean-up: which chunks have a payload, and which
objects were seen without a row."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from memory_service.storage.base import Ids
from memory_service.storage.postgres.database import Database, raw

_CHUNKS = """
    SELECT chunk_id FROM chunks WHERE bank_id = (SELECT bank_id FROM banks WHERE uid = %s)
    AND chunk_id > %s AND chunk_id <= %s AND payload IS NOT NULL ORDER BY chunk_id
"""
_ASIDE = "SELECT chunk_id FROM quarantine WHERE uid = %s AND chunk_id > %s AND chunk_id <= %s ORDER BY chunk_id"
_MARK = "INSERT INTO marks (object, time) SELECT unnest(%s::text[]), %s ON CONFLICT DO NOTHING"


class ObjectRows:
    """Implements `memory_service.storage.s3.orphans.Records` for a database. Threads share it."""

    def __init__(self, database: Database, lost: Callable[[str, int], object]) -> None:
        """Read and mark rows of a database. lost: takes a chunk (bank uid, chunk id) out of service."""
        self._database, self._lost = database, lost

    def banks(self) -> Iterable[str]:
        """Return the uids of all banks."""
        with self._database.read() as connection:
            return [uid for (uid,) in raw(connection).execute("SELECT uid FROM banks ORDER BY uid")]

    def chunks(self, bank_uid: str, after: int, upto: int) -> Ids:
        """Return the ids of chunks that have a payload; see `Records.chunks`."""
        return self._ids(_CHUNKS, bank_uid, after, upto)

    def aside(self, bank_uid: str, after: int, upto: int) -> Ids:
        """Return the ids of chunks that are out of service; see `Records.aside`."""
        return self._ids(_ASIDE, bank_uid, after, upto)

    def _ids(self, statement: str, *bounds: object) -> Ids:
        with self._database.read() as connection:
            rows = raw(connection).execute(statement, bounds, binary=True)
            return np.fromiter((chunk_id for (chunk_id,) in rows), np.int64)

    def marked(self, keys: Sequence[str]) -> Mapping[str, int]:
        """Return those of the keys that have a mark, and when each got it."""
        with self._database.read() as connection:
            statement = "SELECT object, time FROM marks WHERE object = ANY(%s)"
            return dict(raw(connection).execute(statement, (list(keys),)))

    def mark(self, keys: Sequence[str], time: int) -> None:
        """Give marks to keys that have none."""
        self._database.change(lambda connection: raw(connection).execute(_MARK, (list(keys), time)))

    def unmark(self, keys: Sequence[str]) -> None:
        """Take the marks of keys away."""
        statement = "DELETE FROM marks WHERE object = ANY(%s)"
        self._database.change(lambda connection: raw(connection).execute(statement, (list(keys),)))

    def unmark_before(self, time: int) -> None:
        """Take away all marks that were given before a time."""
        statement = "DELETE FROM marks WHERE time < %s"
        self._database.change(lambda connection: raw(connection).execute(statement, (time,)))

    def lost(self, bank_uid: str, chunk_id: int) -> None:
        """Take a chunk out of service whose object is not there."""
        self._lost(bank_uid, chunk_id)
