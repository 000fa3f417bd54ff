"""The rows of damaged chunks that were taken out of service, for a person to look at."""

from collections.abc import Mapping

from sqlalchemy import Connection

from memory_service.domain.model import Bank
from memory_service.storage.postgres.database import raw

# `bytea` is shown in hexadecimal digits.
_KEEP = """
    INSERT INTO quarantine (chunk_id, bank_id, uid, why, time, record)
    SELECT c.chunk_id, c.bank_id, %(uid)s, w.why, %(now)s, to_jsonb(c)::text
    FROM unnest(%(ids)s::int8[], %(why)s::text[]) AS w(chunk_id, why)
    JOIN chunks c ON c.bank_id = %(bank)s AND c.chunk_id = w.chunk_id
    ON CONFLICT DO NOTHING
"""


def keep(connection: Connection, bank: Bank, why: Mapping[int, str], now: int) -> None:
    """Keep the rows of chunks aside. why: a sentence for each chunk id. now: microseconds since 1970."""
    given = {"uid": bank.uid, "bank": bank.bank_id, "now": now, "ids": list(why), "why": list(why.values())}
    raw(connection).execute(_KEEP, given)
