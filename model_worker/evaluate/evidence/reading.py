"""The files of a data set, which are the user's: whatever is wrong with them is one error that names the file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_worker.errors import InputError
from model_worker.text_files import read_text


def json_lines(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, record) of every `*.jsonl` in a folder. Raises InputError where there is none, or no JSON."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise InputError(f"{folder} has no file *.jsonl")
    for path in paths:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if line.strip():
                yield f"{path.name}:{number}", parsed(f"{path}:{number}", line)


def parsed(name: str, text: str) -> Any:
    """Return what a text in JSON says. name: of the text, for the InputError that is raised where it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} is no JSON: {error}") from None
