"""What was said in a session and not answered: kept beside its log, so that nothing that a person typed is lost.

There is one line of JSON for each message. A message is in the file from before its turn begins until the turn is in
the log, or until the same words are answered later.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvbank.files.durable import replace

_FILE = "unanswered.jsonl"


class Unanswered:
    """The messages of the session in `folder` that have no answer."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _FILE

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
            self._write([*before, text])
        yield
        left = [message for message in before if message != text]
        with suppress(OSError):
            self._write(left)

    def _write(self, messages: list[str]) -> None:
        """Replace the messages of the file, durably: a write that fails leaves the former ones."""
        if not messages:
            self.path.unlink(missing_ok=True)
            return
        lines = [json.dumps(message).encode() + b"\n" for message in messages]
        replace(self.path, lines, sync="bytes")
