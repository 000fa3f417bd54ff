"""The file in a model's folder that says where the model came from.

The file is written last, into a folder that gets its name only then: a folder that has it is whole. The module is light
to import: no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "kvbank-source.json"


@dataclass(frozen=True, slots=True)
class Record:
    """Where a model came from.

    source: the hub's repository and commit, the package and its version, or a path. fetched_sha256: of the wheel that
    was taken apart, None for other sources. files: sha256 of each file of the folder, by name. date: in UTC. versions:
    of the packages that made the folder.
    """

    name: str
    kind: str
    source: str
    licence: str
    date: str
    fetched_sha256: str | None
    files: Mapping[str, str]
    versions: Mapping[str, str]


def read_record(folder: Path) -> Record | None:
    """Return the record of a model's folder; None for a folder without one, or with one that cannot be read."""
    try:
        return Record(**json.loads((folder / FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def record_bytes(record: Record) -> bytes:
    """Return the record as the file has it."""
    return json.dumps(asdict(record), indent=2, sort_keys=True).encode() + b"\n"
