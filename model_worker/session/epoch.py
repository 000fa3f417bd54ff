"""Which copy of a session its bank belongs to.

A session's folder can be copied, or come back from a backup, and both copies can be talked to; one bank would then hold
two histories. So every opening and every turn write a fresh epoch into the folder, then into the bank's metadata, and a
copy that does not know the bank's epoch is refused. The file names the bank's epoch before and the fresh one: where a
crash came between the two writes, the bank still has one that its owner knows.
"""

import json
import secrets
from collections.abc import Collection
from pathlib import Path

import kvbank
from kvbank.files.durable import replace
from model_worker.errors import SessionError

KEY = "session_epoch"


def known_epochs(path: Path) -> list[str]:
    """The last two epochs of the file; one that is missing or damaged knows none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    return [str(epoch) for epoch in found] if isinstance(found, list) else []


def is_known(bank: kvbank.Bank, epochs: Collection[str]) -> bool:
    """Whether a bank is that of a copy which knows these epochs; one without an epoch is anybody's."""
    return bank.metadata.get(KEY, "") in {"", *epochs}


class BankEpoch:
    """The claim of a session's folder on its bank. path: the file of that folder which has the epochs."""

    def __init__(self, client: kvbank.Client, bank: str, path: Path):
        self._client, self._bank, self._path = client, bank, path

    def claim(self, timeout: float) -> None:
        """Make this copy the bank's.

        Raises SessionError, with nothing changed, where another copy was talked to since this one was, or the bank is
        an older one; and what the service raises.
        """
        bank = self._client.get_bank(self._bank, timeout=timeout)
        before = str(bank.metadata.get(KEY, ""))
        if not is_known(bank, known_epochs(self._path)):
            raise self._elsewhere()
        fresh = secrets.token_hex(8)
        self._write([before, fresh])
        self._client.update_bank(self._bank, metadata={**bank.metadata, KEY: fresh}, timeout=timeout)

    def _elsewhere(self) -> SessionError:
        name = self._path.parent.name
        return SessionError(
            f"bank {self._bank} is no longer that of this copy of session {name!r}: another copy was talked to since, "
            f"or the bank is an older one; `kvbank session fork {name} NEW_NAME` goes on from here with a bank of its "
            "own"
        )

    def _write(self, epochs: list[str]) -> None:
        try:
            replace(self._path, [json.dumps(epochs).encode()])
        except OSError as error:
            raise SessionError(f"{self._path} could not be written: {error}") from None
