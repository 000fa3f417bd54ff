"""The return of a chunk that was set aside to its bank, where it is whole. This file owns what "whole" means: the
record, from quarantine or from the copy in the payload file, is as it was written; every tensor has its checksum; the
bank is there; and neither the id nor the key has been used for another chunk since."""

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection

from kvbank.files import durable, private
from memory_service.care import payload_file
from memory_service.domain import payload as payloads
from memory_service.domain.chunk_size import stored_bytes
from memory_service.domain.model import Bank
from memory_service.storage.base import DamagedError
from memory_service.storage.chunks import row_checksum
from memory_service.storage.chunks.payload_json import payload_of
from memory_service.storage.chunks.row import row_of
from memory_service.storage.local import leftovers, quarantine
from memory_service.storage.local.files import layout, objects
from memory_service.storage.local.quarantine import Note
from memory_service.storage.local.records import bank_rows, chunk_rows
from memory_service.storage.local.records.schema import raw

_BYTES = ("key", "digest", "token_ids", "embedding")
# A chunk that was quarantined was counted before; one that is found without a record is new.
_COUNTED_BEFORE = """
    UPDATE banks SET chunks_written = chunks_written - 1, chunks_quarantined = chunks_quarantined - 1
    WHERE bank_id = ? AND chunks_quarantined > 0
"""
_OTHER_OF_KEY = "SELECT 1 FROM keys WHERE bank_id = ? AND key = ? AND chunk_id != ?"
_FREE_IDS = "UPDATE store SET next_chunk_id = max(next_chunk_id, ? + 1)"


class Whole(NamedTuple):
    """A chunk that can be given back: its row, and whether the bank has counted it before."""

    row: Mapping[str, Any]
    counted: bool


def judge(connection: Connection, note: Note) -> Whole | str | None:
    """Judge whether a chunk that was set aside can be given back.

    Returns the chunk if so; the reason, as a sentence, if not; None where it need not be, because its write was
    repeated. Errors: OSError for a file that cannot be read, so that it is not known whether it is whole.
    """
    bank = _bank(connection, note.bank_uid)
    if bank is None:
        return "its bank has no record"
    if raw(connection).execute("SELECT 1 FROM chunks WHERE chunk_id = ?", (note.chunk_id,)).fetchone():
        return "there is a chunk with its id"
    if leftovers.is_repeated(connection, note.bank_uid, note.chunk_id, note.file):
        return None
    row = _row(bank, note)
    if isinstance(row, str):
        return row
    if raw(connection).execute(_OTHER_OF_KEY, (bank.bank_id, row["key"], note.chunk_id)).fetchone():
        return "its key was used for another chunk since"
    return Whole(row, _counted(note))


def _counted(note: Note) -> bool:
    """Tell whether the bank has counted the chunk before: quarantine has its record then."""
    return "chunk" in note.record


def _row(bank: Bank, note: Note) -> Mapping[str, Any] | str:
    """Make the row of a chunk from what is kept of it, or say in a sentence why that cannot be. Errors: OSError for a
    file that cannot be read."""
    try:
        row = _recorded(note) if _counted(note) else _copied(bank, note)
    except (OSError, DamagedError) as error:
        kind, why = payload_file.trouble(note.file, error)
        if kind == "payload_unreadable":
            raise
        return why
    except (ValueError, KeyError, TypeError) as error:
        return str(error) or "its record cannot be read"
    fits = len(row["embedding"]) == 4 * bank.embedding.dimension
    return row if fits else "its embedding does not fit its bank"


def give_back(connection: Connection, data: Path, note: Note, whole: Whole) -> None:
    """Put the file in its place, durably, and then insert the row, in the caller's transaction. The caller discards the
    note after the commit."""
    place = data / layout.name(note.bank_uid, note.chunk_id)
    private.make_folder(place.parent)
    quarantine.move(note.file, place)
    for folder in (place.parent, place.parent.parent):
        durable.sync_folder(folder)
    driver, row = raw(connection), whole.row
    driver.execute("DELETE FROM spent_keys WHERE chunk_id = ?", (note.chunk_id,))
    driver.execute("DELETE FROM keys WHERE bank_id = ? AND key = ?", (row["bank_id"], row["key"]))
    chunk_rows.insert(connection, row["bank_id"], [row])
    if whole.counted:
        driver.execute(_COUNTED_BEFORE, (row["bank_id"],))
    driver.execute(_FREE_IDS, (note.chunk_id,))


def _bank(connection: Connection, uid: str) -> Bank | None:
    found = raw(connection).execute("SELECT bank_id FROM banks WHERE uid = ?", (uid,)).fetchone()
    return bank_rows.get(connection, found[0]) if found else None


def _recorded(note: Note) -> dict[str, Any]:
    """Return the row that quarantine has kept. Errors: those that `judge` catches."""
    row: dict[str, Any] = note.record["chunk"] | (note.record["content"] or {})
    row |= {name: base64.b64decode(row[name]) for name in _BYTES}
    if flaw := row_checksum.flaw(row):
        raise ValueError(flaw)
    payload = payload_of(row["payload"])
    if payload is None:
        raise ValueError("it has no payload")
    payload_file.read(note.file, note.bank_uid, note.chunk_id, payload)
    # A record of an earlier version does not say what the chunk takes.
    return {"size": row["payload_bytes"]} | row


def _copied(bank: Bank, note: Note) -> Mapping[str, Any]:
    """Make the row from the copy in the file. Errors: those that `judge` catches."""
    owner, head = (note.bank_uid, note.chunk_id), objects.read_header(note.file)
    chunk, digest, checksums = payloads.copied(head, owner)
    assert chunk.payload is not None
    payload = payloads.described(chunk.payload, payloads.seed(*owner), head, checksums)
    payload_file.read(note.file, *owner, payload)
    size = stored_bytes(chunk, json.dumps(dict(chunk.metadata)))
    return row_of(bank.bank_id, replace(chunk, payload=payload, stored_bytes=size), digest)
