"""The folder of sessions: which there are, and what their logs say.

What is read here is as it is on disk now, also of a session that another process writes to. It imports no torch.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from model_worker.errors import InputError, SessionError
from model_worker.session.log_format import Header, Turn, parse

LOG = "log.jsonl"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BANK = re.compile(r"session-(.+)-[0-9a-f]{8}")


def sessions_folder() -> Path:
    """Return the folder in which sessions are kept by default."""
    import platformdirs

    return Path(platformdirs.user_state_dir("kvbank")) / "sessions"


def read_sessions(sessions: Path) -> Iterator[tuple[Header, list[Turn]]]:
    """Yield the header and turns of every session of a folder, by name; a damaged one is left out, with a warning."""
    for path in sorted(sessions.glob(f"*/{LOG}")):
        try:
            header, turns, _ = parse(path, path.read_bytes())
        except FileNotFoundError:
            continue
        except SessionError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            continue
        if header is not None:
            yield header, turns


def without_session(banks: Iterable[str], sessions: Path) -> list[str]:
    """Return those of `banks` that are named as a session's bank, and belong to no session of the folder.

    They may belong to sessions on other machines. A session whose log is damaged counts as the owner of all banks that
    bear its name.
    """
    owned, unsure = set(), set()
    for path in sessions.glob(f"*/{LOG}"):
        try:
            header, _, _ = parse(path, path.read_bytes())
        except (OSError, SessionError):
            unsure.add(path.parent.name)
        else:
            owned |= set() if header is None else {header.bank}
    named = ((bank, _BANK.fullmatch(bank)) for bank in banks)
    return [bank for bank, found in named if found and bank not in owned and found[1] not in unsure]


def read_session(sessions: Path, name: str) -> tuple[Header, list[Turn]]:
    """Return the header and turns of a session. Raises SessionError where there is none of this name."""
    found = find_session(sessions, name)
    if found is None:
        raise SessionError(f"there is no session {name!r} in {sessions}")
    return found


def find_session(sessions: Path, name: str) -> tuple[Header, list[Turn]] | None:
    """Return the header and turns of a session, or None where there is none of this name."""
    path = session_folder(sessions, name) / LOG
    try:
        header, turns, _ = parse(path, path.read_bytes())
    except FileNotFoundError:
        return None
    return None if header is None else (header, turns)


def session_folder(sessions: Path, name: str) -> Path:
    """Return the folder of a session. Raises InputError for a name that is no session's."""
    if not _NAME.fullmatch(name):
        raise InputError(f"session name {name!r}: 1 to 64 letters, digits, '.', '_' or '-', first a letter or digit")
    return sessions.absolute() / name
