"""Which chunks of a bank are of turns that are forgotten, and which had attended to these. This file owns how that is
told: by branch and offset in the metadata of a chunk, and by the context in which its K-V were made."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection

from memory_service.domain.sessions import BRANCH
from memory_service.storage.local.records.forgotten_turns import Part
from memory_service.storage.local.records.schema import raw

# Why a chunk goes: its tokens are forgotten, or it had attended to such.
Why = Literal["of them", "attended"]
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


class Chosen(NamedTuple):
    """Chunks that go, by id: those of forgotten tokens, and those that had attended to them."""

    of_them: list[int]
    attended: list[int]


class Forgotten(NamedTuple):
    """Parts of branches whose tokens are forgotten, and parts behind those, whose tokens were seen together with
    them."""

    parts: Sequence[Part]
    behind: Sequence[Part] = ()

    @property
    def branches(self) -> list[str]:
        """Return the names of all branches."""
        return [part.branch for part in (*self.parts, *self.behind)]

    def why(self, branch: object, start: int, length: int, context: object) -> Why | None:
        """Return why a chunk goes; None for one that stays. context: that of its producer."""
        if any(part.branch == branch and start < part.end and start + length > part.begin for part in self.parts):
            return "of them"
        if context == "window" and any(part.branch == branch and start >= part.begin for part in self.behind):
            return "attended"
        return None

    def why_of_row(self, row: Mapping[str, Any]) -> Why | None:
        """Do as `why` for a row of `chunks` with its contents, as quarantine keeps it. Errors: ValueError, TypeError,
        KeyError for one that cannot be read."""
        producer: Mapping[str, Any] = {}
        with suppress(KeyError, IndexError):
            producer = json.loads(row["payload"] or "[]")[1]
        branch = json.loads(row["meta"]).get(BRANCH)
        return self.why(branch, int(row["start"]), int(row["original_length"]), producer.get("context"))

    def chosen(self, connection: Connection, bank_id: int) -> Chosen:
        """Find the chunks of a bank that go."""
        return self._chosen(connection, _FOUND, bank_id)

    def logged(self, connection: Connection, bank_id: int) -> list[int]:
        """Find the chunks of forgotten tokens that were evicted, and of which the log of evictions tells."""
        return self._chosen(connection, _LOGGED, bank_id).of_them

    def _chosen(self, connection: Connection, statement: str, bank_id: int) -> Chosen:
        asked = {"path": f"$.{BRANCH}", "bank": bank_id, "branches": json.dumps(self.branches)}
        chosen = Chosen([], [])
        for chunk_id, *said in raw(connection).execute(statement, asked):
            why = self.why(*said)
            if why is not None:
                (chosen.of_them if why == "of them" else chosen.attended).append(chunk_id)
        return chosen
