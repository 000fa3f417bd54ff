"""The check of the snapshots of indexes against the records. This file owns what a sound snapshot is: whole, only of
ids that were given, and with the vectors of the records, within the error that the snapshot states. An id that has no
row any more is dead in the index too, and no problem."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_service.care import entries
from memory_service.care.entries import BankEntry
from memory_service.care.folder import Folder, names, settled
from memory_service.care.report import Findings, Progress

FOLDER = "indexes"
_PAGE = 2048
_UIDS = "SELECT uid FROM banks UNION SELECT uid FROM gone_banks"
_NEXT_ID = "SELECT next_chunk_id FROM store"
_VECTORS = """
    SELECT c.chunk_id, c.bank_id, t.embedding FROM chunks c JOIN contents t USING (chunk_id)
    WHERE c.chunk_id IN (SELECT value FROM json_each(?))
"""


def check(folder: Folder, findings: Findings, *, fast: bool, alone: bool, progress: Progress) -> None:
    """Add the problems of the snapshots to the findings. fast: whether to compare no vectors. alone: whether the caller
    holds the folder's lock."""
    findings.totals["snapshots"] = 0
    files = [
        (bank, folder.path / FOLDER / bank.uid / name)
        for bank in entries.banks(folder)
        for name in names(folder.path / FOLDER / bank.uid)
        if name.endswith(".segment")
    ]
    for number, (bank, path) in enumerate(files, 1):
        problem = _problem(folder, bank, path, fast=fast)
        # A server removes a snapshot when it has a better one.
        if path.exists():
            findings.totals["snapshots"] += 1
            if problem:
                name = str(path.relative_to(folder.path))
                findings.add("index_damaged", problem, bank=bank.title, path=name)
        progress("snapshots", number, len(files))
    for name in settled(folder, _orphans, alone=alone):
        findings.add("orphan_index", "no bank owns it", path=name)


def _problem(folder: Folder, bank: BankEntry, path: Path, *, fast: bool) -> str:
    # Half a second of FAISS, for a folder that has snapshots.
    from memory_service.search.snapshots import Snapshots, UnusableError

    files = Snapshots(path.parent, folder.store_id(), bank.dimension or 0, min_free=0, durable=False)
    try:
        segment = files.read(path)
    except UnusableError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    ids = segment.ids[: segment.rows]
    with folder.read() as connection:
        next_id = connection.exec_driver_sql(_NEXT_ID).scalar_one()
    if len(ids) and not 1 <= ids.min() <= ids.max() < next_id:
        return "it holds ids that were never given"
    if len(np.unique(ids)) != len(ids):
        return "it holds an id twice"
    pieces = () if fast else segment.pieces()
    for rows, vectors in pieces:
        for begin in range(0, len(rows), _PAGE):
            part = slice(begin, begin + _PAGE)
            if wrong := _wrong(folder, bank, ids[rows[part]], vectors[part], segment.error):
                return f"{wrong[0]} has another vector than in the records" + _more(len(wrong) - 1)
    return ""


def _wrong(folder: Folder, bank: BankEntry, ids: NDArray[np.int64], vectors: NDArray[Any], error: float) -> list[int]:
    """Return the chunks that are alive, and have another vector (or another bank) in the records."""
    with folder.read() as connection:
        rows = connection.exec_driver_sql(_VECTORS, (json.dumps(ids.tolist()),)).all()
    place = {int(chunk_id): number for number, chunk_id in enumerate(ids)}
    wrong = []
    for chunk_id, bank_id, embedding in rows:
        kept = vectors[place[chunk_id]].astype(np.float64)
        expected = np.frombuffer(embedding, "<f4").astype(np.float64)
        same = bank_id == bank.bank_id and expected.shape == kept.shape
        if not same or not np.linalg.norm(kept - expected) <= error * 1.001:
            wrong.append(chunk_id)
    return wrong


def _more(count: int) -> str:
    return f", and {count} more" if count else ""


def _orphans(folder: Folder) -> Iterator[str]:
    """Yield the names, relative to the folder, of files that are half written and of folders without a bank."""
    root = folder.path / FOLDER
    listed = [name for name in names(root) if (root / name).is_dir()]
    with folder.read() as connection:
        known = set(connection.exec_driver_sql(_UIDS).scalars())
    for uid in listed:
        if uid not in known:
            yield f"{FOLDER}/{uid}"
        yield from (f"{FOLDER}/{uid}/{name}" for name in names(root / uid) if uid in known and name.endswith(".tmp"))
