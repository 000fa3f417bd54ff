"""quarantine/: what was taken out of service, for a person to look at. quarantine/<bank uid>/<chunk id>.json is the
record, bytes as base64, and <chunk id>.safetensors beside it the file, if there was one."""

import base64
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from kvbank import _private
from memory_service.payloads import SUFFIX, name, sync_folder
from memory_service.schema import raw

FOLDER = "quarantine"
_CHUNKS = "SELECT * FROM chunks WHERE chunk_id IN (SELECT value FROM json_each(?))"
_CONTENTS = "SELECT * FROM contents WHERE chunk_id IN (SELECT value FROM json_each(?))"
# Several callers may meet one damaged chunk at once; whoever comes second finds all of it done.
_one_at_a_time = threading.Lock()


def set_aside(connection: Connection, data: Path, bank_uid: str, why: Mapping[int, str]) -> None:
    """Records and files of chunks (id -> reason), durably; the rows stay, so that a kill before they go loses nothing.

    Once more does nothing.
    """
    with _one_at_a_time:
        folder = data / FOLDER / bank_uid
        _private.make_folder(folder)
        ids = json.dumps(list(why))
        with _any_text(connection):
            contents = {row.chunk_id: _plain(row._mapping) for row in connection.exec_driver_sql(_CONTENTS, (ids,))}
            chunks = connection.exec_driver_sql(_CHUNKS, (ids,)).all()
        for row in chunks:
            record = {
                "why": why[row.chunk_id],
                "quarantined": datetime.now(UTC).isoformat(timespec="seconds"),
                "chunk": _plain(row._mapping),
                "content": contents.get(row.chunk_id),
            }
            _save(folder / f"{row.chunk_id}.json", record)
            # Missing, or removed this moment, because the chunk was deleted or evicted.
            with suppress(FileNotFoundError, NotADirectoryError):
                os.rename(data / name(bank_uid, row.chunk_id), folder / f"{row.chunk_id}{SUFFIX}")
        for changed in (folder, folder.parent, data):
            sync_folder(changed)


@contextmanager
def _any_text(connection: Connection) -> Iterator[None]:
    """Text that is damaged need not be UTF-8; its other bytes are kept as lone surrogates."""
    driver = raw(connection)
    driver.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    try:
        yield
    finally:
        driver.text_factory = str


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(name): base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in row.items()
    }


def _save(path: Path, record: dict[str, Any]) -> None:
    """Keep one that is there: a run that was killed after it had moved the file would say that it is missing."""
    if path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", opener=_private.opener) as file:
        json.dump(record, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
