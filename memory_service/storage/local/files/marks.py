"""The marks of payload folders. This file owns how the folder that was made for payloads is told from another in its
place, such as the empty place of a disk that is not mounted: the former has a file that says so, in the folder of all
payloads and in that of each bank.
"""

import os
import re
from pathlib import Path

from kvbank.files.durable import sync_folder
from kvbank.files.opening import opener
from memory_service.storage.local.files.layout import BANK, MARK

_TEXT = "kvbank keeps payloads here{}; without this file it takes the folder for a disk that is not mounted\n"
_OWNER, _OWNER_OF = ", those of bank {}", re.compile(rb", those of bank ([0-9a-f]{16});")
# Bytes of a mark that are looked at.
_LONGEST = 1024


def marked(folder: Path | str) -> bool:
    """Tell whether a folder of payloads has its mark, and so is the one that was made for them."""
    return _owner(folder) in ("", os.path.basename(folder))


def displaced(folder: Path) -> bool:
    """Tell whether a folder is by its mark that of another bank, which has no folder in the right place."""
    owner = _owner(folder)
    return owner not in (None, "", folder.name) and not marked(folder.parent / str(owner))


def _owner(folder: Path | str) -> str | None:
    """Return the bank that the mark of a folder names, or "" where it names none; None where there is no mark."""
    try:
        descriptor = opener(f"{folder}/{MARK}", os.O_RDONLY)
        try:
            named = _OWNER_OF.search(os.read(descriptor, _LONGEST))
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # a mark is there, and what else is wrong with the disk shows at the files
        return ""
    return named[1].decode() if named else ""


def put_mark(folder: Path, *, durable: bool) -> None:
    """Put a mark into a folder. A mark that is there stays, also one that names another bank."""
    if _owner(folder) is not None:
        return
    text = _TEXT.format(_OWNER.format(folder.name) if BANK.fullmatch(folder.name) else "")
    descriptor = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, text.encode())
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if durable:
        sync_folder(folder)
