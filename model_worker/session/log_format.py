"""The form of a session's log, which `kvbank.files.session_log` owns, with what the worker adds to it: headers of new
sessions, and the worker's errors. It imports no torch."""

import secrets
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kvbank
from kvbank.files import session_log
from kvbank.files.session_log import Header, Turn, first_line, turn_line
from model_worker.errors import SessionError

__all__ = ["Header", "Turn", "first_line", "is_named", "new_header", "now", "own_bank", "parse", "turn_line"]


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_header(name: str, **fields: Any) -> Header:
    """Make the header of a session that begins now, with a uid and a bank of its own.

    fields: the rest of `Header`; a bank, where it is to have another name.
    """
    uid = secrets.token_hex(16)
    made = Header(uid, name, created=now(), **{"bank": "", **fields})
    return made if made.bank else replace(made, bank=own_bank(made))


def own_bank(header: Header) -> str:
    """Return the name of a session's bank where no other was asked for."""
    return f"session-{header.name}-{header.uid[:8]}"


def is_named(header: Header) -> bool:
    """Tell whether a session's bank was given a name, which other banks may have too."""
    return header.bank != own_bank(header)


def parse(path: Path, data: bytes) -> tuple[Header | None, list[Turn], int]:
    """Return what `session_log.parse` does. Raises SessionError for a log that is damaged, or of another version."""
    try:
        return session_log.parse(path, data)
    except (kvbank.DataLoss, kvbank.InvalidArgument) as error:
        raise SessionError(str(error)) from None
