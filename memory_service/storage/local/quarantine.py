"""The folder quarantine/ has what was taken out of service, for a person to look at. quarantine/<bank uid>/<chunk
id>.json is the record, with bytes as base64, and <chunk id>.safetensors beside it the file, if there was one."""

import base64
import errno
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection

from kvbank.files import durable, private
from memory_service.domain import payload as payloads
from memory_service.storage.chunks.row import row_of
from memory_service.storage.local.files import objects
from memory_service.storage.local.files.layout import QUARANTINE, SUFFIX, name
from memory_service.storage.local.records.schema import raw

# A record has this entry while `repair` has not looked at it yet.
PENDING = "pending"
# Bytes of a file that are copied at a time.
_PART = 1 << 20
_ID = re.compile(r"[1-9][0-9]{0,18}")
_CHUNKS = "SELECT * FROM chunks WHERE chunk_id IN (SELECT value FROM json_each(?))"
_CONTENTS = "SELECT * FROM contents WHERE chunk_id IN (SELECT value FROM json_each(?))"
# Several callers may meet one damaged chunk at once; the second one finds all of it done.
_one_at_a_time = threading.Lock()


def set_aside(connection: Connection, data: Path, bank_uid: str, why: Mapping[int, str]) -> None:
    """Put records and files of chunks into quarantine, durably. The rows stay, so that a kill before the caller removes
    them loses nothing. A second call for a chunk does nothing.

    why: chunk id -> the reason, as a sentence.
    """
    with _one_at_a_time:
        folder = data / QUARANTINE / bank_uid
        private.make_folder(folder)
        ids = json.dumps(list(why))
        with _any_text(connection):
            contents = {row.chunk_id: _plain(row._mapping) for row in connection.exec_driver_sql(_CONTENTS, (ids,))}
            chunks = connection.exec_driver_sql(_CHUNKS, (ids,)).all()
        left = []
        for row in chunks:
            record = {
                "why": why[row.chunk_id],
                "quarantined": _now(),
                "chunk": _plain(row._mapping),
                "content": contents.get(row.chunk_id),
            }
            _save(folder / f"{row.chunk_id}.json", record)
            with suppress(FileNotFoundError, NotADirectoryError):  # missing, or the chunk is being removed
                path = data / name(bank_uid, row.chunk_id)
                move(path, folder / f"{row.chunk_id}{SUFFIX}")
                left.append(path.parent)
        # The folders that files have left come last: a file may have both names after a power cut, and must have one.
        for changed in (folder, folder.parent, data, *left):
            durable.sync_folder(changed)


def set_file_aside(data: Path, bank_uid: str, chunk_id: int, path: Path, why: str) -> "Note":
    """Put a payload that no row names into quarantine, durably, where `repair` looks at it. Where the chunk already has
    a record there, whose file was missing, the record and the file come together again."""
    folder = data / QUARANTINE / bank_uid
    with _one_at_a_time:
        private.make_folder(folder)
        record = {"why": why, "quarantined": _now(), "bank": bank_uid, "chunk_id": chunk_id}
        record |= note_of(data, bank_uid, chunk_id, path).record | {PENDING: True}
        _write(folder / f"{chunk_id}.json", record)
        file = move(path, folder / f"{chunk_id}{SUFFIX}")
        for changed in (folder, folder.parent, data, path.parent):
            durable.sync_folder(changed)
    return Note(bank_uid, chunk_id, record, file)


def has_record(data: Path, bank_uid: str, chunk_id: int) -> bool:
    """Tell whether quarantine has a record of this chunk."""
    return (data / QUARANTINE / bank_uid / f"{chunk_id}.json").exists()


class Note(NamedTuple):
    """A chunk that `repair` has still to look at: its record in quarantine, and where its file is."""

    bank_uid: str
    chunk_id: int
    record: dict[str, Any]
    file: Path

    @property
    def place(self) -> Path:
        """Return the path of the record, once the file is in quarantine."""
        return self.file.with_name(f"{self.chunk_id}.json")


def note_of(data: Path, bank_uid: str, chunk_id: int, file: Path) -> Note:
    """Make the note of a file that lies elsewhere, with the record that quarantine may have of its chunk."""
    record: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        record = json.loads((data / QUARANTINE / bank_uid / f"{chunk_id}.json").read_bytes())
    return Note(bank_uid, chunk_id, record, file)


def pending(data: Path) -> Iterator[Note]:
    """Yield the notes of what was set aside and not judged yet."""
    for path in sorted((data / QUARANTINE).glob("*/*.json")):
        if _ID.fullmatch(path.stem) is None:
            continue
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get(PENDING):
            yield Note(path.parent.name, int(path.stem), record, path.with_suffix(SUFFIX))


def judged(note: Note, why: str) -> None:
    """Note in the record that `repair` has looked at the chunk, and why it stays in quarantine."""
    record = {name: value for name, value in note.record.items() if name != PENDING}
    _write(note.place, record | {"why": f"{record.get('why', '')}; {why}".lstrip("; ")})
    durable.sync_folder(note.place.parent)


def discard(note: Note) -> None:
    """Remove record and file, which are of no more use."""
    note.file.unlink(missing_ok=True)
    note.place.unlink(missing_ok=True)


def forget(data: Path, bank_uid: str, goes: Callable[[int, Mapping[str, Any] | None], bool]) -> int:
    """Remove records and files of chunks of a bank, durably, and return of how many chunks.

    goes: tells of a chunk, by its id, whether it goes; it gets the row of `chunks` and `contents`, as far as record or
    file say it, and None where neither does.
    """
    with _one_at_a_time:
        files = _files(data, bank_uid)
        gone = [chunk_id for chunk_id, row in rows(data, bank_uid) if goes(chunk_id, row)]
        for file in (file for chunk_id in gone for file in files.get(chunk_id, ())):
            file.unlink()
        if gone:
            durable.sync_folder(data / QUARANTINE / bank_uid)
    return len(gone)


def drop(data: Path, bank_uid: str) -> bool:
    """Remove all that there is of a deleted bank, and return whether none of it is left. What a person has put there
    stays."""
    folder = data / QUARANTINE / bank_uid
    with _one_at_a_time, suppress(OSError):
        for file in (file for files in _files(data, bank_uid).values() for file in files):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
        if folder.parent.is_dir():
            durable.sync_folder(folder if folder.is_dir() else folder.parent)
        return True
    return False


def chunks_of(data: Path, bank_uid: str) -> list[int]:
    """Return the ids of the chunks of a bank that are in quarantine, in ascending order."""
    return sorted(_files(data, bank_uid))


def _files(data: Path, bank_uid: str) -> Mapping[int, Sequence[Path]]:
    """Return the files of the chunks of a bank that are in quarantine, by chunk id."""
    found = dict[int, list[Path]]()
    with suppress(FileNotFoundError):
        for entry in (data / QUARANTINE / bank_uid).iterdir():
            stem, dot, _ = entry.name.partition(".")
            if dot and _ID.fullmatch(stem):
                found.setdefault(int(stem), []).append(entry)
    return found


def bank_uids(data: Path) -> list[str]:
    """Return the uids of the banks that have something in quarantine; some of them may be deleted."""
    return sorted(folder.name for folder in (data / QUARANTINE).glob("*") if folder.is_dir())


def rows(data: Path, bank_uid: str) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """Yield the ids of the chunks of a bank in quarantine, each with its row, as `forget` tells it."""
    for chunk_id in chunks_of(data, bank_uid):
        yield chunk_id, _row_of(data / QUARANTINE / bank_uid, bank_uid, chunk_id)


def _row_of(folder: Path, bank_uid: str, chunk_id: int) -> Mapping[str, Any] | None:
    """Return the row of a chunk, from its record or from the copy in its file; None where neither has it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / f"{chunk_id}.json").read_bytes())
        return {**record["chunk"], **(record["content"] or {})}
    with suppress(OSError, ValueError):
        head = objects.read_header(folder / f"{chunk_id}{SUFFIX}")
        chunk, digest, _ = payloads.copied(head, (bank_uid, chunk_id))
        return row_of(0, chunk, digest)
    return None


def ids(data: Path) -> Iterator[int]:
    """Yield the ids of all chunks in quarantine; one may come twice."""
    for path in (data / QUARANTINE).glob("*/*"):
        if _ID.fullmatch(path.stem):
            yield int(path.stem)


def move(source: Path, target: Path) -> Path:
    """Move a file, also to another file system, and return its new path, which is beside `target` where that is taken.
    The bytes are durable after that; its names are when the caller has synced both folders. Errors: OSError, and both
    places are as they were."""
    number = 1
    while os.path.lexists(target):
        number += 1
        target = target.with_name(f"{target.name.partition('.')[0]}.{number}{SUFFIX}")
    try:
        if stat.S_ISREG(os.lstat(source).st_mode):
            durable.sync_file(source)  # a small one may have been left to be synced with others
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(source, target)
        source.unlink()
    return target


def _copy(source: Path, target: Path) -> None:
    """Copy a file, so that `target` is whole or not there. A link is copied as a link; of anything else that is no
    regular file only the name is kept, as an empty file."""
    found = source.lstat()
    if stat.S_ISREG(found.st_mode):
        with open(source, "rb") as old:
            durable.replace(target, iter(partial(old.read, _PART), b""), sync="bytes")
        return
    with durable.renamed(target.with_suffix(".tmp"), target) as temporary:
        if stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(source), temporary)
        else:
            temporary.touch()


@contextmanager
def _any_text(connection: Connection) -> Iterator[None]:
    """Let the block read text that is damaged and no UTF-8; the bytes that are none become lone surrogates."""
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
    """Write the record of a chunk, unless there is one: after a kill between record and row, that one says what was
    found when the file was still in its place."""
    try:
        kept = "chunk" in json.loads(path.read_bytes())
    except (OSError, ValueError):
        kept = False
    if not kept:
        _write(path, record)


def _write(path: Path, record: dict[str, Any]) -> None:
    durable.replace(path, [json.dumps(record, indent=2).encode()], sync="bytes")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
