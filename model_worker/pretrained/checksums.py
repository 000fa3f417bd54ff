"""Files are known here by their SHA-256."""

import hashlib
from pathlib import Path

from model_worker.errors import ModelNotFound


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Errors: OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the one that was pinned. Raises ModelNotFound. Errors: OSError."""
    found = sha256_of(path)
    if found != expected:
        raise ModelNotFound(f"{path} is damaged or another file: its sha256 is {found}, {expected} is expected")
