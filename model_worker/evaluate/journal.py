"""The journal of a measurement: one JSON line for each part that is finished, so that an interrupted run goes on.

This file owns the rule that a line counts only for the run that wrote it: each line names the digest of everything that
decides its figures.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from model_worker.errors import InputError

_LINE = b'{"run": "'  # as `put` begins a line


class Journal:
    """The finished parts of one run, by key, in memory and in a file of JSON lines.

    path: the file, which may be there already; None keeps nothing. run: what decides the figures, as plain values.
    Raises InputError for a file that cannot be read, or has a line that is no JSON object.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any]):
        self._path = path
        self._digest = xxhash.xxh3_64_hexdigest(json.dumps(run, sort_keys=True, default=str).encode())
        self._parts: dict[str, Any] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().splitlines(keepends=True)
            for number, line in enumerate(lines, 1):
                if number == len(lines) and not line.endswith(b"\n") and _begins_line(line):
                    with path.open("r+b") as file:  # the run ended within this line
                        file.truncate(sum(map(len, lines[:-1])))
                    break
                found = json.loads(line)
                if found["run"] == self._digest:
                    self._parts[found["key"]] = found["part"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = getattr(error, "strerror", None) or f"line {number} is no line of a journal"
            raise InputError(f"cannot go on with {path}: {said}") from None

    def get(self, key: str) -> Any | None:
        """Return the part that was finished under this key, in this run or an earlier one; None where there is none."""
        return self._parts.get(key)

    def put(self, key: str, part: Any) -> None:
        """Note a finished part, plain values, at the end of the file."""
        self._parts[key] = part
        if self._path is not None:
            line = json.dumps({"run": self._digest, "key": key, "part": part}, allow_nan=False)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _begins_line(line: bytes) -> bool:
    """Return whether these bytes are the beginning of a line that `put` writes, and not of another file."""
    return line.startswith(_LINE) or _LINE.startswith(line)
