"""Banks of deleted sessions that could not be deleted with them, because their service was away.

There is a note for each bank, in a folder beside the sessions whose name cannot be a session's. It imports no torch.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import kvbank
from kvbank.files.durable import make_folder, replace
from model_worker.errors import SessionError
from model_worker.session.epoch import is_known

_FOLDER = ".left-banks"


@dataclass(frozen=True, slots=True)
class LeftBank:
    """A bank that is still to be deleted.

    memory: its service. session: the name of the session that it belonged to. time: when that session was deleted.
    epochs: the words by which the bank is told from one that another copy of the session goes on with.
    """

    bank: str
    memory: str
    session: str
    time: str
    epochs: Sequence[str] = ()


def note(sessions: Path, left: LeftBank) -> None:
    """Note a bank, durably. The log that names the bank is removed after that."""
    folder = sessions / _FOLDER
    make_folder(folder)
    replace(folder / f"{left.bank}.json", [json.dumps(asdict(left)).encode()])


def noted(sessions: Path) -> list[LeftBank]:
    """Return the banks that are noted, by name; a note that is damaged counts as none."""
    found = []
    for path in sorted((sessions / _FOLDER).glob("*.json")):
        with suppress(OSError, ValueError, TypeError):
            found.append(LeftBank(**json.loads(path.read_bytes())))
    return found


def delete_own(client: kvbank.Client, bank: str, epochs: Sequence[str]) -> None:
    """Delete a session's bank. Raises SessionError where another copy of the session goes on with it."""
    if not is_known(client.get_bank(bank), epochs):
        raise SessionError(f"bank {bank} is that of another copy of the session, which was talked to since")
    client.delete_bank(bank)


def delete_noted(sessions: Path) -> Iterator[tuple[LeftBank, str]]:
    """Delete the banks that are noted; yield each with the reason why it is still there, empty where it has gone."""
    for left in noted(sessions):
        try:
            with kvbank.connect(left.memory, timeout=3, first_contact=1) as client, suppress(kvbank.BankNotFound):
                delete_own(client, left.bank, left.epochs)
        except kvbank.KVBankError as error:
            yield left, str(error)
            if not isinstance(error, SessionError):  # another copy's bank is nothing to be deleted later
                continue
        else:
            yield left, ""
        (sessions / _FOLDER / f"{left.bank}.json").unlink(missing_ok=True)
    with suppress(OSError):  # there is a note in it still, or it never was
        (sessions / _FOLDER).rmdir()
