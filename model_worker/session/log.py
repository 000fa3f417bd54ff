"""The durable log of a session: what was said, token by token.

This file owns the rule that a turn which was acknowledged is never lost, and a turn which was not is never there: a
line is synced before `append` returns. The form of the lines is that of `log_format.py`. It imports no torch.
"""

import os
import shutil
import warnings
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Self

from kvbank.files import locks, private
from kvbank.files.durable import make_folder, sync_folder
from model_worker.errors import SessionError
from model_worker.session.folder import LOG, read_session, session_folder
from model_worker.session.log_format import Header, Turn, first_line, new_header, parse, turn_line

# What a session keeps in its folder, finished or in the making.
_FILES = ("window.safetensors", "window.tmp", "epoch", "epoch.tmp", "unanswered.jsonl", "unanswered.tmp")
_OURS = {LOG, *_FILES, "spool", "rewriting"}


class SessionLog:
    """A session's log, open for one process.

    header: what the session is; None before `begin`. turns: those that are on disk.
    """

    def __init__(self, folder: Path, file: FileIO, header: Header | None, turns: list[Turn]):
        self.folder, self.header, self.turns = folder, header, turns
        self._file = file

    @classmethod
    def open(cls, sessions: Path, name: str, *, must_exist: bool = False) -> Self:
        """Lock the session `name` of the folder `sessions`, and cut off a line that a crash left unfinished.

        Raises SessionError for a session that another process has, or whose log is damaged; with `must_exist` also
        where there is no such session, which is made otherwise.
        """
        folder = session_folder(sessions, name)
        if must_exist and not (folder / LOG).exists():
            raise SessionError(f"there is no session {name!r} in {sessions}")
        file = _locked(folder, name)
        try:
            header, turns, size = parse(folder / LOG, file.read())
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

    def begin(self, **fields: Any) -> Header:
        """Write the first line of a new session. fields: those of `Header`, except uid, name and time."""
        assert self.header is None
        header = new_header(self.folder.name, **fields)
        self._write(first_line(header))
        sync_folder(self.folder)
        self.header = header
        return header

    def append(self, turn: Turn) -> None:
        """Write a turn, which is durable when this returns. Raises SessionError, with nothing written."""
        assert self.header is not None
        self._write(turn_line(turn, len(self.turns) + 1))
        self.turns.append(turn)

    def _write(self, line: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except BaseException as error:  # Ctrl-C too: a line that is not counted would take the next one's place
            with suppress(OSError):  # a line without its end would be cut off at the next open anyway
                self._file.truncate(end)
            if not isinstance(error, OSError):
                raise
            raise SessionError(f"session {self.folder.name!r}: the turn could not be written: {error}") from None

    @property
    def spool(self) -> Path:
        """Return the folder in which chunks of this session wait while the service is away."""
        return self.folder / "spool"

    @property
    def window(self) -> Path:
        """Return the file in which the window of this session is kept between processes."""
        return self.folder / "window.safetensors"

    @property
    def epoch(self) -> Path:
        """Return the file of words by which the session's bank knows this copy of the session (see epoch.py)."""
        return self.folder / "epoch"

    @property
    def rewriting(self) -> Path:
        """Return a file that is there while the bank is written again from the log.

        A rewriting that was killed is found by this file, and starts over.
        """
        return self.folder / "rewriting"

    def remove(self) -> None:
        """Delete the session from this disk. The log goes first: without a log there is no session."""
        (self.folder / LOG).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        self.close()

    def close(self) -> None:
        """Close the log, so that another process can have the session."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def fork(sessions: Path, name: str, new: str) -> Header:
    """Begin the session `new` with what was said in the session `name`.

    The bank of the new session is written from its log when the session is opened. The new log is there whole or not at
    all. Raises SessionError where there is no `name`, or a session `new` already.
    """
    header, turns = read_session(sessions, name)
    folder = session_folder(sessions, new)
    kept = ("model", "reader", "chunk", "memory", "sinks", "system", "embed", "adapter")
    made = new_header(new, **{field: getattr(header, field) for field in kept})
    lines = [first_line(made), *(turn_line(turn, number) for number, turn in enumerate(turns, 1))]
    unfinished = folder.parent / f".fork-{made.uid}"
    make_folder(unfinished)
    try:
        with open(unfinished / LOG, "wb", opener=private.opener) as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(unfinished)
        if (folder / LOG).exists():
            raise SessionError(f"there is a session {new!r} already")
        unfinished.rename(folder)
    except OSError as error:
        raise SessionError(f"session {new!r} could not be made: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync_folder(folder.parent)
    return made


def _locked(folder: Path, name: str) -> FileIO:
    """Open the log of a folder, which is made if it is not there, and lock it. Raises SessionError."""
    try:
        while True:
            make_folder(folder)
            # Unbuffered: what could not be written must not come along with the next line.
            file = open(folder / LOG, "a+b", buffering=0, opener=private.opener)  # noqa: SIM115 (returned)
            if not locks.take(file.fileno()):
                file.close()
                raise SessionError(f"session {name!r} is in use by another process")
            with suppress(FileNotFoundError):  # removed between open and lock: then this lock is on nothing
                if os.fstat(file.fileno()).st_ino == (folder / LOG).stat().st_ino:
                    file.seek(0)
                    private.close_ours(folder, _OURS.__contains__)  # as an earlier version may have left them
                    return file
            file.close()
    except OSError as error:
        raise SessionError(f"session {name!r} cannot be opened: {error}") from None
