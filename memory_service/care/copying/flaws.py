"""What is wrong with rows that are carried: they are compared with the checksums that were written with them, whichever
engine they come from. A function of this file returns a sentence, "" for a sound row."""

import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from memory_service.care.copying import tables
from memory_service.care.report import Kind
from memory_service.domain.errors import ServiceError
from memory_service.domain.model import Bank, Payload
from memory_service.domain.payload import seed
from memory_service.storage.chunks import row_checksum
from memory_service.storage.chunks.payload_json import payload_of
from memory_service.storage.sessions import session_row, turn_row
from memory_service.storage.sessions.session_row import Branch, branch_checksum

_STUMBLES = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, struct.error)


def of_chunk(row: Mapping[str, Any], bank: Bank) -> tuple[Payload | None, str]:
    """Return the descriptor of a chunk's payload, and what is wrong with the row."""
    try:
        payload = payload_of(row["payload"])
        flaw = _of_embedding(row, bank) or _of_descriptor(row, bank, payload) or row_checksum.flaw(row)
    except _STUMBLES:
        return None, "its record cannot be read"
    return payload, flaw


def _of_embedding(row: Mapping[str, Any], bank: Bank) -> str:
    vector = np.frombuffer(row["embedding"], "<f4")
    if len(vector) != bank.embedding.dimension:
        return f"its embedding has {len(vector)} dimensions instead of {bank.embedding.dimension}"
    return "" if np.isfinite(vector).all() else "its embedding is not finite"


def _of_descriptor(row: Mapping[str, Any], bank: Bank, payload: Payload | None) -> str:
    if row["payload_bytes"] != (payload.length if payload else 0):
        return "its descriptor has another length than its row"
    if payload is not None and payload.seed != seed(bank.uid, row["chunk_id"]):
        return "its descriptor belongs to another chunk"
    return ""


def of_session(row: Mapping[str, Any]) -> str:
    """Tell whether a session is as it was written."""
    return "" if session_row.session_of(row) else f"session {row['session_id']} is not as it was written"


def of_branch(row: Mapping[str, Any]) -> str:
    """Tell whether a branch of a session is as it was written."""
    *said, checksum = (row[name] for name in session_row.BRANCH_COLUMNS)
    try:
        sound = checksum == branch_checksum(Branch(*said))
    except _STUMBLES:
        sound = False
    return "" if sound else f"branch {row['branch']} of a session is not as it was written"


def of_turn(row: Mapping[str, Any]) -> str:
    """Tell whether a turn is as it was written."""
    try:
        turn_row.turn_of(row, row["token_ids"], "")
    except (ServiceError, *_STUMBLES):
        return f"turn {row['number']} of branch {row['branch']} is not as it was written"
    return ""


# What checks the rows of a table that have checksums, and the kind of the problem.
BY_TABLE: Mapping[str, tuple[Kind, Callable[[Mapping[str, Any]], str]]] = {
    tables.SESSIONS.name: ("session", of_session),
    tables.BRANCHES.name: ("session", of_branch),
    tables.TURNS.name: ("turn", of_turn),
}
