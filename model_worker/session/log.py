"""The durable log of a session: what was said, token by token.

This file owns the rule that a turn which was acknowledged is never lost and a turn which was not is never there. One
append-only file of JSON lines, each with a checksum of its content and place; a line is synced before `append`
returns, so only the last line can be torn, and that one was never acknowledged. A last line that is whole and wrong was
acknowledged and is damaged, like any other. Light to import: no torch.
"""

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, Self

import xxhash

from kvbank.files import locks, private
from kvbank.files.durable import make_folder, sync_folder
from model_worker.errors import InputError, SessionError

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BANK = re.compile(r"session-(.+)-[0-9a-f]{8}")
_FILE = "log.jsonl"
# What a session keeps in its folder, finished or in the making.
_FILES = ("window.safetensors", "window.tmp", "epoch", "epoch.tmp", "unanswered.jsonl", "unanswered.tmp")
_OURS = {_FILE, *_FILES, "spool", "rewriting"}
_SECTOR = 512  # what a disk writes whole
_START = len('{"xxh3":"0123456789abcdef",')


@dataclass(frozen=True, slots=True)
class Header:
    """What a session is, fixed when it begins.

    model: the name it was loaded by. reader: the digest that its K-V are bound to. bank: the bank it owns; it carries a
    part of `uid`, so that sessions of one name on different machines never share a memory. chunk: tokens a chunk, fixed
    so that chunk boundaries are. memory: the memory service it was begun with.
    """

    uid: str
    name: str
    model: str
    reader: str
    bank: str
    chunk: int
    memory: str
    created: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished turn, or the part of a message longer than the window that has been read (no text, no answer).

    ids: all tokens as the model saw them; the first `prompt` of them are not the answer. kept: tokens of the session
    that were safe in the bank (or its spool) when this was written: a rebuilt window starts there.
    """

    text: str
    answer: str
    ids: list[int]
    prompt: int
    kept: int
    time: str
    part: bool = False


class SessionLog:
    """A session's log, open for one process. `header` is None before `begin`; `turns` are those on disk."""

    def __init__(self, folder: Path, file: FileIO, header: Header | None, turns: list[Turn]):
        self.folder, self.header, self.turns = folder, header, turns
        self._file = file

    @classmethod
    def open(cls, sessions: Path, name: str, *, must_exist: bool = False) -> Self:
        """Lock the session `name` of the folder `sessions`, and cut off a line that a crash left unfinished."""
        folder = _folder(sessions, name)
        if must_exist and not (folder / _FILE).exists():
            raise SessionError(f"there is no session {name!r} in {sessions}")
        file = _locked(folder, name)
        try:
            header, turns, size = _parse(folder / _FILE, file.read())
            if size < os.fstat(file.fileno()).st_size:
                torn = os.fstat(file.fileno()).st_size - size
                warnings.warn(
                    f"session {name!r}: {torn} bytes of an unfinished turn cut off", RuntimeWarning, stacklevel=2
                )
                file.truncate(size)
                os.fsync(file.fileno())
        except BaseException:
            file.close()
            raise
        return cls(folder, file, header, turns)

    def begin(self, *, model: str, reader: str, chunk: int, memory: str) -> Header:
        """Write the first line of a new session."""
        assert self.header is None
        header = _header_of(self.folder.name, model=model, reader=reader, chunk=chunk, memory=memory)
        self._write(_begun(header), 0)
        sync_folder(self.folder)
        self.header = header
        return header

    def append(self, turn: Turn) -> None:
        """Make a turn durable; it is when this returns."""
        assert self.header is not None
        self._write(_said(turn), len(self.turns) + 1)
        self.turns.append(turn)

    def _write(self, record: dict[str, Any], number: int) -> None:
        end = self._file.seek(0, os.SEEK_END)
        rest = _line(record, number)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException as error:  # Ctrl-C too: a line that nobody counts would take the next one's place
            with suppress(OSError):  # a line without its end would be cut off at the next open anyway
                self._file.truncate(end)
            if not isinstance(error, OSError):
                raise
            raise SessionError(f"session {self.folder.name!r}: the turn could not be written: {error}") from None

    @property
    def spool(self) -> Path:
        """Where chunks of this session wait while the service is away."""
        return self.folder / "spool"

    @property
    def window(self) -> Path:
        """Where the window of this session is kept between processes."""
        return self.folder / "window.safetensors"

    @property
    def epoch(self) -> Path:
        """By which the session's bank knows this copy of it (see epoch.py)."""
        return self.folder / "epoch"

    @property
    def rewriting(self) -> Path:
        """There while the bank is being written again from the log, so that a killed rewriting starts over."""
        return self.folder / "rewriting"

    def remove(self) -> None:
        """Delete the session from this disk. The log goes first: a session without it is not there."""
        (self.folder / _FILE).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        self.close()

    def close(self) -> None:
        """Let another process have the session."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def fork(sessions: Path, name: str, new: str) -> Header:
    """Begin the session `new` with what was said in `name`; its bank is written from the log when it is opened.

    The log is there whole or not at all. Raises SessionError where there is no `name`, or a session `new` already.
    """
    header, turns = read_session(sessions, name)
    folder = _folder(sessions, new)
    made = _header_of(new, model=header.model, reader=header.reader, chunk=header.chunk, memory=header.memory)
    lines = [_line(_begun(made), 0)]
    lines += [_line(_said(turn), number) for number, turn in enumerate(turns, 1)]
    unfinished = folder.parent / f".fork-{made.uid}"
    make_folder(unfinished)
    try:
        with (unfinished / _FILE).open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(unfinished)
        if (folder / _FILE).exists():
            raise SessionError(f"there is a session {new!r} already")
        unfinished.rename(folder)
    except OSError as error:
        raise SessionError(f"session {new!r} could not be made: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync_folder(folder.parent)
    return made


def sessions_folder() -> Path:
    """Where sessions are kept unless said otherwise."""
    import platformdirs

    return Path(platformdirs.user_state_dir("kvbank")) / "sessions"


def read_sessions(sessions: Path) -> Iterator[tuple[Header, list[Turn]]]:
    """All sessions of a folder by name, as they are on disk now; one that another process writes to, too.

    A damaged one is left out, with a warning.
    """
    for path in sorted(sessions.glob(f"*/{_FILE}")):
        try:
            header, turns, _ = _parse(path, path.read_bytes())
        except FileNotFoundError:
            continue
        except SessionError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            continue
        if header is not None:
            yield header, turns


def without_session(banks: Iterable[str], sessions: Path) -> list[str]:
    """Those of `banks` that are named as a session's, and belong to none of the folder.

    Sessions on other machines are not known here. A session whose log is damaged counts as the owner of all that bear
    its name.
    """
    owned, unsure = set(), set()
    for path in sessions.glob(f"*/{_FILE}"):
        try:
            header, _, _ = _parse(path, path.read_bytes())
        except (OSError, SessionError):
            unsure.add(path.parent.name)
        else:
            owned |= set() if header is None else {header.bank}
    named = ((bank, _BANK.fullmatch(bank)) for bank in banks)
    return [bank for bank, found in named if found and bank not in owned and found[1] not in unsure]


def read_session(sessions: Path, name: str) -> tuple[Header, list[Turn]]:
    """One session as it is on disk now."""
    found = find_session(sessions, name)
    if found is None:
        raise SessionError(f"there is no session {name!r} in {sessions}")
    return found


def find_session(sessions: Path, name: str) -> tuple[Header, list[Turn]] | None:
    """As `read_session`; None where there is none."""
    path = _folder(sessions, name) / _FILE
    try:
        header, turns, _ = _parse(path, path.read_bytes())
    except FileNotFoundError:
        return None
    return None if header is None else (header, turns)


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _folder(sessions: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise InputError(f"session name {name!r}: 1 to 64 letters, digits, '.', '_' or '-', first a letter or digit")
    return sessions.absolute() / name


def _header_of(name: str, *, model: str, reader: str, chunk: int, memory: str) -> Header:
    uid = secrets.token_hex(16)
    return Header(uid, name, model, reader, f"session-{name}-{uid[:8]}", chunk, memory, now())


def _begun(header: Header) -> dict[str, Any]:
    return {"kind": "session", "format": FORMAT, **asdict(header)}


def _said(turn: Turn) -> dict[str, Any]:
    return {"kind": "turn", **asdict(turn)}


def _locked(folder: Path, name: str) -> FileIO:
    try:
        while True:
            make_folder(folder)
            # Unbuffered: what could not be written must not come along with the next line.
            file = open(folder / _FILE, "a+b", buffering=0, opener=private.opener)  # noqa: SIM115 (returned)
            if not locks.take(file.fileno()):
                file.close()
                raise SessionError(f"session {name!r} is in use by another process")
            with suppress(FileNotFoundError):  # removed between open and lock: then this lock is on nothing
                if os.fstat(file.fileno()).st_ino == (folder / _FILE).stat().st_ino:
                    file.seek(0)
                    private.close_ours(folder, _OURS.__contains__)  # as an earlier version may have left them
                    return file
            file.close()
    except OSError as error:
        raise SessionError(f"session {name!r} cannot be opened: {error}") from None


def _line(record: dict[str, Any], number: int) -> bytes:
    body = json.dumps(record, separators=(",", ":")).encode()
    return b'{"xxh3":"%s",' % xxhash.xxh3_64_hexdigest(body, seed=number).encode() + body[1:] + b"\n"


def _parse(path: Path, data: bytes) -> tuple[Header | None, list[Turn], int]:
    """Header, turns, and how many bytes of the file they are; the rest is one torn line."""
    header, turns, size = None, [], 0
    for number, line in enumerate(data.splitlines(keepends=True)):
        record = _record(line, number)
        if record is None:
            if size + len(line) == len(data) and _torn(line, number, size):
                break
            raise SessionError(f"{path}: line {number + 1} is damaged; the session cannot go on from a log with a hole")
        if number == 0:
            header = _header(path, record)
        else:
            turns.append(Turn(**record))
        size += len(line)
    return header, turns, size


def _torn(line: bytes, number: int, at: int) -> bool:
    """Whether a last line whose checksum is wrong, at byte `at`, may be one that was never acknowledged: it has no end,
    or blocks that never came to the disk, which read as zeros (no line of ours has any)."""
    holes = [(at + hole.start(), at + hole.end()) for hole in re.finditer(rb"\0+", line)]
    end = at + len(line)
    if holes and all((a == at or a % _SECTOR == 0) and (b == end or b % _SECTOR == 0) for a, b in holes):
        return True
    # With another end it would be right: then that is the damage.
    return not line.endswith(b"\n") and _record(line[:-1] + b"\n", number) is None


def _record(line: bytes, number: int) -> dict[str, Any] | None:
    body = b"{" + line[_START:].removesuffix(b"\n")
    check = line[9:25].decode(errors="replace")
    if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(body, seed=number) != check:
        return None
    record: dict[str, Any] = json.loads(body)
    if number:
        record.pop("kind")
    return record


def _header(path: Path, record: dict[str, Any]) -> Header:
    if record.pop("kind") != "session" or record.pop("format") != FORMAT:
        raise SessionError(f"{path} was written by another version of kvbank")
    return Header(**record)
