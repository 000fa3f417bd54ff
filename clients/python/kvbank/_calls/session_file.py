"""A session in one file: JSON lines, the first of which says what the session is, and each other one a turn.

Each line has a checksum of its content and its place, and the first one says how many there are, so that a file that
was cut, mixed or changed is refused. This file also owns how a file, or the folder of a chat session of an earlier
version, becomes a session again.
"""

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import xxhash

from kvbank import _session_models as m
from kvbank._arguments import expected, flag, invalid, text
from kvbank._exceptions import (
    DataLoss,
    FailedPrecondition,
    SessionExists,
    SessionNotFound,
    TurnConflict,
    TurnNotFound,
)
from kvbank.files import checked_lines, durable, private, session_log

# Called with the turns that are done, and how many there are in all.
Progress = Callable[[int, int], object]
FORMAT = 1
_KIND = "kvbank-session"
# What one call appends at most, unless a single turn has more.
_MOST_TURNS, _MOST_BYTES = 100, 1 << 20
# The setting of a session that is not imported to its end: the digest of its file.
_IMPORTING = "importing"
_MOST_PAIRS = 16
_FORGOTTEN = "forgotten"


# Writing


class Writing:
    """A file that is being written."""

    def __init__(self, file: BinaryIO, session: m.Session, progress: Progress | None) -> None:
        self._file, self._session, self._progress = file, session, progress
        self._turns = 0
        named = ("session_id", "name", "bank", "reads", "reader_digest", "settings", "metadata", "head", "tokens")
        about = {name: getattr(session, name) for name in named}
        times = {"create_time": session.create_time.isoformat(), "export_time": datetime.now(UTC).isoformat()}
        file.write(checked_lines.written({"kind": _KIND, "format": FORMAT, **about, **times}, 0))

    def add(self, turn: m.Turn) -> bool:
        """Write the next turn; return whether a further one is wanted. Turns that were appended after the file was
        begun are left out."""
        if self._turns >= self._session.head:
            return False
        self._turns += 1
        record = asdict(turn) | {"kind": "turn", "create_time": turn.create_time and turn.create_time.isoformat()}
        self._file.write(checked_lines.written(record, self._turns))
        if self._progress is not None:
            self._progress(self._turns, self._session.head)
        return self._turns < self._session.head

    def finish(self, now: m.Session) -> None:
        """Check that the file is whole. now: the session after its last turn was read. Errors: TurnConflict."""
        last = self._session.stretches[-1].branch
        ends = [one.start_before for one in now.stretches if one.branch == last]
        went_on = bool(ends) and (ends[0] is None or ends[0] >= self._session.tokens)
        if not went_on or self._turns != self._session.head:
            raise TurnConflict(f"session {now.session_id} was rewound while it was exported; export it again")

    def sync(self) -> None:
        """Make the bytes of the file durable; its name follows at the end of the block."""
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def written(
    path: str | os.PathLike[str], session: m.Session, overwrite: bool, progress: Progress | None
) -> Iterator[Writing]:
    """Give the file of a session to write turns into; it gets its name at the end of the block, and is removed after an
    error. Errors: InvalidArgument for a path that cannot be written."""
    target, progress = _path(path), _callable(progress)
    if not flag("overwrite", overwrite) and target.exists():
        raise invalid("path", f"{target} is there already; name another file, or say that it is to be replaced")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with durable.renamed(temporary, target), open(temporary, "wb", opener=private.opener) as file:
            yield Writing(file, session, progress)
        durable.sync_folder(target.parent)
    except OSError as error:
        raise invalid("path", f"{target} cannot be written: {error.strerror or error}") from None


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        found = Path(os.fsdecode(path))
    except (TypeError, ValueError):
        raise invalid("path", "expected the name of a file") from None
    try:
        if b"\0" in os.fsencode(found):
            raise invalid("path", "expected the name of a file, got one with a NUL")
    except UnicodeEncodeError:
        raise invalid("path", "expected the name of a file, got one that no file can have") from None
    return found


def _callable(progress: Progress | None) -> Progress | None:
    if progress is not None and not callable(progress):
        raise expected("progress", "a function of two numbers", progress)
    return progress


# Reading


@dataclass(frozen=True, slots=True)
class SessionFile:
    """A session as a file has it, verified.

    digest: names the file's content. turns: yields the turns that are to be appended, in order. count: of these.
    forgotten: how many turns are left out.
    """

    digest: str
    name: str
    reads: Sequence[str]
    reader_digest: str
    settings: Mapping[str, str]
    metadata: Mapping[str, str]
    turns: Callable[[], Iterator[m.Turn]]
    count: int
    forgotten: int


def read(path: str | os.PathLike[str]) -> SessionFile:
    """Read the file of a session, or the folder of a chat session of an earlier version, and verify every line.

    Errors: InvalidArgument for a file that is none; DataLoss, with the line, for one that is damaged.
    """
    found = _path(path)
    file = found / session_log.LOG if found.is_dir() else found
    try:
        with open(file, "rb") as lines:
            first = checked_lines.read(lines.readline(), 0)
        if first is not None and first.get("kind") == "session":
            return _of_log(file)
        if first is None or first.get("kind") != _KIND:
            raise invalid("path", f"{file} is no file of a session, or its first line is damaged")
        if first.get("format") != FORMAT:
            raise invalid("path", f"{file} was written by another version of kvbank")
        return _of_file(file, first)
    except OSError as error:
        raise invalid("path", f"{file} cannot be read: {error.strerror or error}") from None


def _of_file(path: Path, head: Mapping[str, Any]) -> SessionFile:
    digest, count, forgotten = xxhash.xxh3_128(), 0, 0
    for line, turn in _lines(path):
        digest.update(line)
        if turn is not None:
            count, forgotten = count + 1, forgotten + (turn.status == _FORGOTTEN)
    named = ("name", "reads", "reader_digest", "settings", "metadata", "head")
    if missing := [name for name in named if name not in head]:
        raise invalid("path", f"{path}: line 1 has no {missing[0]}")
    if count != head["head"]:
        raise DataLoss(f"{path} ends after {count} of {head['head']} turns; export the session again")
    return SessionFile(
        digest=digest.hexdigest(),
        **{name: head[name] for name in named[:-1]},
        turns=lambda: _without_forgotten(turn for _, turn in _lines(path) if turn is not None),
        count=count - forgotten,
        forgotten=forgotten,
    )


def _lines(path: Path) -> Iterator[tuple[bytes, m.Turn | None]]:
    """Yield each line of a file with its turn, and None for the first one. Errors: DataLoss for one that is damaged."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            record = checked_lines.read(line, number)
            if record is None:
                raise DataLoss(f"{path}: line {number + 1} is damaged; nothing behind it can be read")
            try:
                yield line, _turn(record) if number else None
            except (KeyError, TypeError, ValueError) as error:
                raise invalid("path", f"{path}: line {number + 1} has no turn: {error}") from None


def _turn(record: Mapping[str, Any]) -> m.Turn:
    fields = {name: value for name, value in record.items() if name not in ("kind", "items", "create_time")}
    created = record["create_time"] and datetime.fromisoformat(record["create_time"])
    return m.Turn([m.Item(**item) for item in record["items"]], **fields, create_time=created)


def _without_forgotten(turns: Iterator[m.Turn]) -> Iterator[m.Turn]:
    """Yield turns as a new session has them, without the forgotten ones: what was kept before counts the others."""
    gone: list[tuple[int, int]] = []  # start and count of forgotten turns
    for turn in turns:
        if turn.status == _FORGOTTEN:
            gone.append((turn.start, turn.token_count))
            continue
        missing = sum(min(max(turn.kept - start, 0), count) for start, count in gone)
        created = turn.create_time.isoformat(timespec="seconds") if turn.create_time else ""
        yield replace(turn, kept=turn.kept - missing, metadata=_dated(turn.metadata, created))


def _dated(metadata: Mapping[str, str], created: str) -> Mapping[str, str]:
    """Return metadata with the time when a turn was said first, where there is room for it."""
    if not created or "created" in metadata or len(metadata) >= _MOST_PAIRS:
        return metadata
    return {**metadata, "created": created}


def _of_log(path: Path) -> SessionFile:
    """Read the log of a chat session of an earlier version."""
    data = path.read_bytes()
    try:
        header, turns, size = session_log.parse(path, data)
    except (KeyError, TypeError) as error:
        raise invalid("path", f"{path} has other fields than the log of a session: {error}") from None
    if header is None:
        raise invalid("path", f"{path} has no session")
    about = {name: str(getattr(header, name)) for name in ("model", "chunk", "sinks", "system", "embed", "adapter")}
    return SessionFile(
        digest=xxhash.xxh3_128_hexdigest(data[:size]),
        name=header.name,
        reads=(),
        reader_digest=header.reader,
        settings={name: value for name, value in about.items() if value},
        metadata={},
        turns=lambda: (_of_logged(turn, f"{header.uid}/{number}") for number, turn in enumerate(turns, 1)),
        count=len(turns),
        forgotten=0,
    )


def _of_logged(turn: session_log.Turn, key: str) -> m.Turn:
    said = () if turn.part else (m.Item("user", turn.text), m.Item("assistant", turn.answer))
    return m.Turn(
        said,
        turn.ids,
        prompt_tokens=turn.prompt,
        kept=turn.kept,
        status="part" if turn.part else "completed",
        metadata=_dated({}, turn.time),
        key=key,
    )


# Importing


class Step(NamedTuple):
    """A call of an import: a method of `Sessions`, with its arguments."""

    method: str
    arguments: Mapping[str, Any]


def importing(
    path: str | os.PathLike[str], name: str | None, progress: Progress | None
) -> Generator[Step, Any, m.Session]:
    """Make a session of a file, or go on with one that an import before has begun, and return it. See
    `Sessions.import_`."""
    progress, file = _callable(progress), read(path)
    # A session without a name has one until it is whole, by which the next attempt finds it.
    wanted = file.name if name is None else text("name", name)
    session: m.Session = yield from _begun(file, wanted or f"import-{file.digest}")
    # The same file has the same holder, so that an attempt after a crash need not wait for the lease of the one before.
    lease = {"holder": f"import of {file.digest}"}
    session = yield Step("acquire", {"session_id": session.session_id, **lease})
    assert session.lease is not None
    yield from _appended(file, session, session.lease.epoch, progress)
    settings = {key: value for key, value in session.settings.items() if key != _IMPORTING}
    renamed = {} if wanted else {"name": ""}
    whole: m.Session = yield Step("update", {"session_id": session.session_id, "settings": settings, **renamed})
    yield Step("release", {"session_id": session.session_id, "epoch": session.lease.epoch})
    return replace(whole, lease=None)


def _begun(file: SessionFile, name: str) -> Generator[Step, Any, m.Session]:
    """Return the session of a file that is not imported to its end, or make it."""
    about = {"reads": file.reads, "reader_digest": file.reader_digest, "metadata": file.metadata}
    settings = {**file.settings, _IMPORTING: file.digest}
    try:
        made: m.Session = yield Step("create", {"name": name, "settings": settings, **about})
    except SessionExists as taken:
        try:
            found: m.Session = yield Step("get", {"name": name})
        except SessionNotFound:
            raise taken from None
        if found.settings.get(_IMPORTING) != file.digest:
            raise SessionExists(
                f"there is a session {name!r} already; import the file under another name", reason=taken.reason
            ) from None
        return found
    return made


def _appended(
    file: SessionFile, session: m.Session, epoch: int, progress: Progress | None
) -> Generator[Step, Any, None]:
    """Append the turns that the session does not have yet."""
    turns = (replace(turn, key=_key(session.session_id, turn.key)) for turn in file.turns())
    done = session.head
    if done:
        yield from _check_same(session, list(islice(turns, done)))
    for some in _batches(turns):
        yield Step("append", {"session_id": session.session_id, "turns": some, "epoch": epoch, "follows": done})
        done += len(some)
        if progress is not None:
            progress(done, file.count)


def _check_same(session: m.Session, turns: Sequence[m.Turn]) -> Generator[Step, Any, None]:
    """Check that the turns of a session are these. Errors: FailedPrecondition."""
    try:
        if len(turns) == session.head:
            last: m.Turn = yield Step("turn", {"key": turns[-1].key})
            if last.number == session.head and last.session_id == session.session_id:
                return
    except TurnNotFound:
        pass
    raise FailedPrecondition(
        f"session {session.name!r} has other turns than the file; import the file under another name"
    )


def _key(session_id: str, key: str) -> str:
    """Return the key of a turn in the session that it is imported into: keys are unique within a tenant, which may have
    the session that was exported too."""
    return xxhash.xxh3_128_hexdigest(f"{session_id}/{key}".encode())


def _batches(turns: Iterator[m.Turn]) -> Iterator[list[m.Turn]]:
    some: list[m.Turn] = []
    size = 0
    for turn in turns:
        if some and (len(some) == _MOST_TURNS or size + _size(turn) > _MOST_BYTES):
            yield some
            some, size = [], 0
        some.append(turn)
        size += _size(turn)
    if some:
        yield some


def _size(turn: m.Turn) -> int:
    """Return about how many bytes a turn has in a message."""
    return 4 * len(turn.token_ids) + sum(len(item.text) + len(item.json) for item in turn.items)
