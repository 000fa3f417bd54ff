"""What was said in a session and not answered: kept on this machine, so that nothing that a person typed is lost.

There is one file for each session, in the user's state folder, with one line of JSON for each message. A message is in
the file from before its turn begins until the service has the turn, or until the same words are answered later.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvbank.files.durable import make_folder, replace


def unanswered_folder() -> Path:
    """Return the folder in which such messages are kept."""
    import platformdirs

    return Path(platformdirs.user_state_dir("kvbank")) / "unanswered"


class Unanswered:
    """The messages of the session of this id that have no answer. folder: of such messages; None is the user's own."""

    def __init__(self, session_id: str, folder: Path | None = None) -> None:
        self.path = (folder or unanswered_folder()) / f"{session_id}.jsonl"

    def messages(self) -> list[str]:
        """Return the messages, the oldest first, without a line that a crash left unfinished."""
        found = []
        with suppress(FileNotFoundError):
            for line in self.path.read_bytes().splitlines():
                with suppress(ValueError):
                    message = json.loads(line)
                    found += [message] if isinstance(message, str) else []
        return found

    @contextmanager
    def saying(self, text: str) -> Iterator[None]:
        """Keep `text` while the block runs, and afterwards where it raises. A full disk does not stop the turn."""
        before = self.messages()
        with suppress(OSError):
            self._write([*(message for message in before if message != text), text])
        yield
        with suppress(OSError):
            self._write([message for message in before if message != text])

    def _write(self, messages: list[str]) -> None:
        """Replace the messages of the file, durably: a write that fails leaves the former ones."""
        if not messages:
            self.path.unlink(missing_ok=True)
            return
        make_folder(self.path.parent)
        replace(self.path, [json.dumps(message).encode() + b"\n" for message in messages], sync="bytes")
