"""The names of the payload files in a data folder. This file owns what is the service's by its name there: whatever has
another name is left alone.

payloads/<bank uid>/<low byte of the chunk id>/<chunk id>.safetensors
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = "payloads"
SUFFIX = ".safetensors"
# The folder of what was taken out of service; see `memory_service.storage.local.quarantine`.
QUARANTINE = "quarantine"
# The file that marks the folder of all payloads and that of each bank; see `marks`.
MARK = "kvbank.payloads"
BANK = re.compile(r"[0-9a-f]{16}")
_SHARD = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"([1-9][0-9]*)\.(safetensors|tmp)")


def name(bank_uid: str, chunk_id: int) -> str:
    """Return the name of the file of a chunk, relative to its data folder."""
    return f"{FOLDER}/{bank_uid}/{chunk_id & 0xFF:02x}/{chunk_id}{SUFFIX}"


def any_in(data: Path) -> bool:
    """Tell whether a data folder has the payload of any chunk."""
    return any(path.suffix == SUFFIX for bank in banks_in(data) for _, path in files_in(bank))


def banks_in(data: Path) -> list[Path]:
    """Return the folders of banks in a data folder."""
    return [path for path in entries_of(data / FOLDER) if BANK.fullmatch(path.name) and path.is_dir()]


def files_in(bank: Path) -> Iterator[tuple[int, Path]]:
    """Yield chunk id and path of every file in a bank's folder, of payloads (SUFFIX) and temporary ones."""
    for shard in filter(is_shard, entries_of(bank)):
        for path in entries_of(shard):
            if match := _FILE.fullmatch(path.name):
                yield int(match[1]), path


def unowned_file(path: Path) -> tuple[str, int, Path] | None:
    """Return bank uid, chunk id and path of a payload in a folder of a bank; None for any other file."""
    match = _FILE.fullmatch(path.name)
    if match is None or path.suffix != SUFFIX or not BANK.fullmatch(path.parents[1].name) or path.is_dir():
        return None
    return path.parents[1].name, int(match[1]), path


def only_ours(bank: Path) -> bool:
    """Tell whether a bank's folder has nothing but what the service makes."""
    entries = (entry for entry in entries_of(bank) if entry.name != MARK)
    return all(is_shard(entry) and all(map(_FILE.fullmatch, os.listdir(entry))) for entry in entries)


def is_shard(path: Path) -> bool:
    """Tell whether this is a folder that has the files of some chunks of a bank."""
    return bool(_SHARD.fullmatch(path.name)) and path.is_dir()


def entries_of(folder: Path) -> list[Path]:
    """Return what a folder has, sorted; nothing where it is gone, since a server may just have removed it."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
