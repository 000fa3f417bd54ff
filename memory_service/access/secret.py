"""The text of a key, "kvb_ID_SECRET". This file owns its form, and that a secret is kept as its hash alone.

A secret has 32 characters of 62, which are 190 bits of chance: too many to be tried, so that SHA-256 without a salt is
enough, and is fast.
"""

import hashlib
import re
import secrets
import string
from typing import NamedTuple

_LETTERS = string.digits + string.ascii_letters
_ID, _SECRET = 8, 32
_KEY = re.compile(rf"kvb_([0-9A-Za-z]{{{_ID}}})_([0-9A-Za-z]{{{_SECRET}}})", re.ASCII)


class Presented(NamedTuple):
    """What the text of a key says: the key's id, and the hash of its secret."""

    key_id: str
    sha256: bytes


def new() -> tuple[str, str]:
    """Return the id of a new key, and the whole text of the key."""
    key_id, secret = ("".join(secrets.choice(_LETTERS) for _ in range(length)) for length in (_ID, _SECRET))
    return key_id, f"kvb_{key_id}_{secret}"


def read(text: str) -> Presented | None:
    """Return what the text of a key says; None for a text that is no key's."""
    match = _KEY.fullmatch(text)
    return None if match is None else Presented(match[1], hashlib.sha256(match[2].encode()).digest())
