"""Payload files that no row names. This file owns the rule that none is deleted unless a record explains why it is
there: its chunk was removed, its tokens were forgotten, or its write had no answer and was repeated under another id.
Other such files come from writes that a kill cut off and from rows that are lost, which look alike; they are set aside
in quarantine/, and `kvbank repair` gives back those that are whole.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection

from memory_service.domain import payload
from memory_service.domain.model import Chunk
from memory_service.storage.chunks import row_checksum
from memory_service.storage.local import quarantine
from memory_service.storage.local.files import objects
from memory_service.storage.local.records import forgotten_turns
from memory_service.storage.local.records.schema import raw

UNNAMED = "no record names it: its write had no answer, or its record is lost"
_BATCH = 500
# The bank is compared too: a disk that is mounted here may be that of another data folder, whose chunks have the same
# ids.
_REMOVED = """
    SELECT uid, chunk_id FROM spent_keys JOIN banks USING (bank_id)
    WHERE chunk_id IN (SELECT value FROM json_each(:ids))
    UNION SELECT uid, chunk_id FROM evictions JOIN banks USING (bank_id)
    WHERE chunk_id IN (SELECT value FROM json_each(:ids))
"""
_OF_KEY = """
    SELECT keys.chunk_id, coalesce(chunks.digest, spent_keys.digest) FROM keys JOIN banks USING (bank_id)
    LEFT JOIN chunks ON chunks.chunk_id = keys.chunk_id LEFT JOIN spent_keys ON spent_keys.chunk_id = keys.chunk_id
    WHERE uid = ? AND keys.key = ?
"""


class Unowned(NamedTuple):
    """A payload file that no row names, and the chunk whose payload it was."""

    bank_uid: str
    chunk_id: int
    path: Path


class Tidied(NamedTuple):
    """How many files were removed, and how many were set aside."""

    removed: int
    aside: int


def tidy(data: Path, found: Iterable[Unowned], read: Callable[[], AbstractContextManager[Connection]]) -> Tidied:
    """Remove the files that are explained, set the others aside, and look again at those that were set aside earlier.

    read: begins a read transaction. Errors: OSError where a file cannot be set aside; it stays where it is.
    """
    removed, aside, found = 0, 0, iter(found)
    while batch := list(islice(found, _BATCH)):
        with read() as connection:
            explained = explanations(connection, data, batch)
        for file in batch:
            if file in explained:
                file.path.unlink(missing_ok=True)
                removed += 1
            else:
                with suppress(FileNotFoundError):
                    quarantine.set_file_aside(data, *file, UNNAMED)
                    aside += 1
    for note in quarantine.pending(data):
        with read() as connection:
            repeated = is_repeated(connection, note.bank_uid, note.chunk_id, note.file)
        if repeated:
            quarantine.discard(note)
            removed += 1
    return Tidied(removed, aside)


def explanations(connection: Connection, data: Path, files: Sequence[Unowned]) -> set[Unowned]:
    """Return the files that the records explain, and that so may be removed. The file of a chunk that quarantine has a
    record of is not one of them, though the key of the chunk is spent as that of a deleted one is: the file was missing
    when the chunk was quarantined, and has come back."""
    removed = set(raw(connection).execute(_REMOVED, {"ids": _json(files)}))
    return {
        file
        for file in files
        if not quarantine.has_record(data, file.bank_uid, file.chunk_id)
        and (file[:2] in removed or is_repeated(connection, *file) or is_forgotten(connection, *file))
    }


def is_repeated(connection: Connection, bank_uid: str, chunk_id: int, path: Path) -> bool:
    """Tell whether another chunk was written under the key of this one, with the same content. A key is written once:
    so the write of this chunk was never acknowledged, or its record is lost and the other stands for it. A file that
    does not say its key counts as not repeated."""
    if (copied := _copied(bank_uid, chunk_id, path)) is None:
        return False
    chunk, digest = copied
    other, said = raw(connection).execute(_OF_KEY, (bank_uid, chunk.key)).fetchone() or (chunk_id, None)
    same = isinstance(said, bytes) and row_checksum.digest_of(said) == digest
    return same and other != chunk_id


def is_forgotten(connection: Connection, bank_uid: str, chunk_id: int, path: Path) -> bool:
    """Tell whether a file has tokens of a session that were forgotten: its write would have been refused, had a kill
    not cut it off. A file that does not say its chunk has none."""
    copied = _copied(bank_uid, chunk_id, path)
    return copied is not None and forgotten_turns.refuses(connection, copied[0])


def _copied(bank_uid: str, chunk_id: int, path: Path) -> tuple[Chunk, bytes] | None:
    """Read the chunk of a file, and the digest of its request; None where the file does not say them."""
    with suppress(OSError, ValueError):
        return payload.copied(objects.read_header(path), (bank_uid, chunk_id))[:2]
    return None


def _json(files: Sequence[Unowned]) -> str:
    return json.dumps([file.chunk_id for file in files])
