"""The rows of how often each chunk was retrieved, and when last."""

from collections.abc import Iterable, Mapping

from sqlalchemy import Connection

from memory_service.storage.base import Retrievals
from memory_service.storage.postgres.database import raw

# Chunks before their use, as a removal has it, and ascending: so that two transactions seldom wait for each other.
# A chunk that had expired at the first of its retrievals stays expired, because an index may have dropped it already; a
# renewal never shortens a life.
_RENEW = """
    UPDATE chunks c SET expires = greatest(c.expires, n.last + c.ttl)
    FROM unnest(%(ids)s::int8[], %(first)s::int8[], %(last)s::int8[]) AS n(chunk_id, first, last)
    JOIN chunk_use u ON u.chunk_id = n.chunk_id
    WHERE c.bank_id = u.bank_id AND c.chunk_id = u.chunk_id AND c.renew AND c.expires > n.first
"""
_COUNT = """
    UPDATE chunk_use u SET count = u.count + n.times, last = greatest(coalesce(u.last, 0), n.last)
    FROM unnest(%(ids)s::int8[], %(times)s::int8[], %(last)s::int8[]) AS n(chunk_id, times, last)
    WHERE u.chunk_id = n.chunk_id
"""


def add(connection: Connection, counted: Mapping[int, Retrievals]) -> None:
    """Add retrievals by chunk id; those of chunks that are gone are passed over."""
    renewing = {chunk_id: found for chunk_id, found in counted.items() if found.renew}
    for statement, some in ((_RENEW, renewing), (_COUNT, counted)):
        if some:
            ids = sorted(some)
            values = {name: _numbers(getattr(some[i], name) for i in ids) for name in ("times", "first", "last")}
            raw(connection).execute(statement, {**values, "ids": _numbers(ids)})


def _numbers(numbers: Iterable[int]) -> str:
    """Return numbers as the text of an array, which is made and read faster than each number by itself."""
    return "{" + ",".join(map(str, numbers)) + "}"
