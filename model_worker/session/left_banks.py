"""Banks of deleted sessions that could not be deleted with them, because their service was away.

There is a note for each bank, in a folder beside the sessions whose name cannot be a session's. It imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import xxhash

import kvbank
from kvbank.files.durable import make_folder, replace
from model_worker.errors import SessionError
from model_worker.session.epoch import KEY, is_known

_FOLDER = ".left-banks"


@dataclass(frozen=True, slots=True)
class LeftBank:
    """A bank that is still to be deleted.

    memory: its service. session: the name of the session that it belonged to. time: when that session was deleted.
    epochs: the words by which the bank is told from one that another copy of the session goes on with. named: whether
    the bank was given a name, which a bank that the session has not made may have too.
    """

    bank: str
    memory: str
    session: str
    time: str
    epochs: Sequence[str] = ()
    named: bool = False


def note(sessions: Path, left: LeftBank) -> None:
    """Note a bank, durably. The log that names the bank is removed after that."""
    folder = sessions / _FOLDER
    make_folder(folder)
    # A bank may have a name that no file can have, and banks of two services one name.
    name = xxhash.xxh3_128_hexdigest(json.dumps([left.memory, left.bank]).encode())
    replace(folder / f"{name}.json", [json.dumps(asdict(left)).encode()])


def noted(sessions: Path) -> list[LeftBank]:
    """Return the banks that are noted; a note that is damaged counts as none."""
    return [left for _, left in _notes(sessions)]


def _notes(sessions: Path) -> list[tuple[Path, LeftBank]]:
    found = []
    for path in sorted((sessions / _FOLDER).glob("*.json")):
        with suppress(OSError, ValueError, TypeError):
            found.append((path, LeftBank(**json.loads(path.read_bytes()))))
    return found


def delete_own(client: kvbank.Client, bank: str, epochs: Sequence[str], *, named: bool) -> None:
    """Delete a session's bank. named: whether the bank was given a name.

    Raises SessionError where another copy of the session goes on with the bank, and for a bank that only has the name.
    """
    found = client.get_bank(bank)
    if not is_known(found, epochs):
        raise SessionError(f"bank {bank} is that of another copy of the session, which was talked to since")
    if named and KEY not in found.metadata:
        raise SessionError(f"bank {bank} was not made by the session")
    client.delete_bank(bank)


def delete_noted(sessions: Path, api_key: str | None = None) -> Iterator[tuple[LeftBank, str]]:
    """Delete the banks that are noted; yield each with the reason why it is still there, empty where it has gone.

    api_key: for their services, see `kvbank.ConnectOptions`.
    """
    connect = partial(kvbank.connect, timeout=3, first_contact=1, api_key=api_key)
    for path, left in _notes(sessions):
        try:
            with connect(left.memory) as client, suppress(kvbank.BankNotFound):
                delete_own(client, left.bank, left.epochs, named=left.named)
        except kvbank.KVBankError as error:
            yield left, str(error)
            if not isinstance(error, SessionError):  # another copy's bank is nothing to be deleted later
                continue
        else:
            yield left, ""
        path.unlink(missing_ok=True)
    with suppress(OSError):  # there is a note in it still, or it never was
        (sessions / _FOLDER).rmdir()
