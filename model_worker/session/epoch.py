"""An epoch is a random word by which a bank knows the copy of a session that it belongs to.

A session's folder can be copied, or come back from a backup, and both copies can be talked to; one bank would then hold
two histories. This file owns the rule that it never does: every opening and every turn write a fresh epoch into the
folder, then into the bank's metadata, and a copy that does not know the bank's epoch is refused. The file in the folder
names the bank's former epoch and the fresh one, so that after a crash between the two writes the bank still has an
epoch that the copy knows.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from pathlib import Path

import kvbank
from kvbank.files.durable import replace
from model_worker.errors import SessionError

KEY = "session_epoch"


def known_epochs(path: Path) -> list[str]:
    """Read the last two epochs of the file; of a file that is missing or damaged, none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    return [str(epoch) for epoch in found] if isinstance(found, list) else []


def is_known(bank: kvbank.Bank, epochs: Collection[str]) -> bool:
    """Tell whether a bank belongs to a copy that knows these epochs; a bank without an epoch belongs to any copy."""
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
