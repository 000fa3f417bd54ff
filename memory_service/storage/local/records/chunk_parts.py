"""Which chunks of a bank are of turns that are forgotten, and which had attended to these: told by branch and offset in
the metadata of a chunk, and by the context in which its K-V were made. A function of this file reads."""

import json

from sqlalchemy import Connection

from memory_service.domain.sessions import BRANCH
from memory_service.storage.forgetting.parts import Chosen, Forgotten
from memory_service.storage.local.records.schema import raw

_FOUND = """
    SELECT chunks.chunk_id, CASE WHEN json_valid(meta) THEN json_extract(meta, :path) END AS branch, start,
    original_length, CASE WHEN json_valid(payload) THEN json_extract(payload, '$[1].context') END
    FROM chunks JOIN contents USING (chunk_id)
    WHERE bank_id = :bank AND branch IN (SELECT value FROM json_each(:branches))
"""
_LOGGED = """
    SELECT chunk_id, CASE WHEN json_valid(meta) THEN json_extract(meta, :path) END AS branch, start, stored_length, ''
    FROM evictions WHERE bank_id = :bank AND branch IN (SELECT value FROM json_each(:branches))
"""


def chosen(connection: Connection, forgotten: Forgotten, bank_id: int) -> Chosen:
    """Find the chunks of a bank that go."""
    return _chosen(connection, _FOUND, forgotten, bank_id)


def logged(connection: Connection, forgotten: Forgotten, bank_id: int) -> list[int]:
    """Find the chunks of forgotten tokens that were evicted, and of which the log of evictions tells."""
    return _chosen(connection, _LOGGED, forgotten, bank_id).of_them


def _chosen(connection: Connection, statement: str, forgotten: Forgotten, bank_id: int) -> Chosen:
    asked = {"path": f"$.{BRANCH}", "bank": bank_id, "branches": json.dumps(forgotten.branches)}
    found = Chosen([], [])
    for chunk_id, *said in raw(connection).execute(statement, asked):
        why = forgotten.why(*said)
        if why is not None:
            (found.of_them if why == "of them" else found.attended).append(chunk_id)
    return found
