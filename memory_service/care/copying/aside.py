"""Chunks that were taken out of service, as a copy carries them, and as the engines keep them: a data folder has a file
of JSON for each, a database a row. This file owns the forms of their records, which are all JSON of a chunk's row.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kvbank.files import durable
from memory_service.care.copying import tables
from memory_service.care.copying.tables import Row
from memory_service.storage.local import quarantine
from memory_service.storage.local.files.layout import QUARANTINE

_BYTES = ("key", "digest", "token_ids", "embedding")
# In a data folder these columns are in a record of their own.
_CONTENT = ("token_ids", "text", "payload", "embedding")


def said(row: Mapping[str, Any]) -> str:
    """Return the row of a chunk as a copy carries it: JSON of its columns, bytes in base64."""
    values = {name: row[name] for name in tables.CHUNKS.columns}
    return json.dumps({name: _coded(value) for name, value in values.items()})


def _coded(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


# In a data folder


def in_folder(data: Path, banks: Mapping[str, int] | None) -> Iterator[Row]:
    """Yield what a data folder has aside, as far as a record says of which chunk it is. banks: their ids by uid; None
    for all, as their records say them."""
    for uid in quarantine.bank_uids(data):
        for chunk_id, row in quarantine.rows(data, uid) if banks is None or uid in banks else ():
            with suppress(OSError, ValueError, KeyError, TypeError):
                record = json.loads(_record(data, uid, chunk_id).read_bytes())
                if row is None:
                    continue
                # A record of an earlier version does not say what the chunk takes.
                full = {"size": row["payload_bytes"], **row, "chunk_id": chunk_id}
                full["bank_id"] = row["bank_id"] if banks is None else banks[uid]
                full |= {name: bool(full[name]) for name in ("pinned", "renew")}
                time = round(datetime.fromisoformat(record["quarantined"]).timestamp())
                yield (uid, chunk_id, str(record["why"]), time, said(full))


def _record(data: Path, uid: str, chunk_id: int) -> Path:
    return data / QUARANTINE / uid / f"{chunk_id}.json"


def put_in_folder(data: Path, row: Row) -> None:
    """Write the record of a chunk, durably, as a service does."""
    uid, chunk_id, why, time, text = row
    values = json.loads(text)
    record = {
        "why": why,
        "quarantined": datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds"),
        "chunk": {name: value for name, value in values.items() if name not in _CONTENT},
        "content": {name: values[name] for name in ("chunk_id", *_CONTENT)},
    }
    path = _record(data, uid, chunk_id)
    durable.make_folder(path.parent)
    durable.replace(path, [json.dumps(record, indent=2).encode()])


def remove_from_folder(data: Path, row: Row) -> None:
    """Remove the record of a chunk."""
    _record(data, row[0], row[1]).unlink(missing_ok=True)


# In a database


def of_record(record: str) -> str:
    """Return the row of a chunk whose row in the database was kept as JSON, which has bytes in hexadecimal digits."""
    values = json.loads(record)
    row = {"retrieval_count": 0, "last_retrieved": None, **values}
    row |= {name: bytes.fromhex(values[name][2:]) for name in ("key", "digest", "token_ids", "text")}
    row["text"] = row["text"].decode(errors="surrogateescape")
    row["embedding"] = np.array(values["embedding"][1:-1].split(","), np.float32).astype("<f4").tobytes()
    return said(row)


def as_record(text: str, tags: str) -> str:
    """Return the row of a chunk as a database keeps it. tags: its metadata, as filters are held against them."""
    values = json.loads(text)
    row = values | {name: base64.b64decode(values[name]) for name in _BYTES}
    row["text"] = values["text"].encode(errors="surrogateescape")
    vector = np.frombuffer(row["embedding"], "<f4")
    row |= {name: f"\\x{row[name].hex()}" for name in ("key", "digest", "token_ids", "text")}
    row["embedding"] = f"[{','.join(map(str, vector))}]"
    # As it is, because a number of it may be longer than a float.
    return f'{json.dumps(row)[:-1]}, "tags": {tags}}}'
