"""The key that goes with every call is read here. This file owns that a key is never part of an error's text."""

import os
import re
from pathlib import Path

from kvbank._arguments import invalid, text

VARIABLE = "KVBANK_API_KEY"
# Longer than any key or token, and shorter than what gRPC takes of metadata.
_LONGEST = 4096
_KEY = re.compile(rf"[!-~]{{1,{_LONGEST}}}")
# How keys begin, and tokens of an identity provider.
_BEGINNINGS = ("kvb_", "eyJ")


def given(api_key: str | None) -> str:
    """Return the key of an argument or option: the key itself, or, for "@FILE", what the file has in it; "" for None.

    Errors: InvalidArgument for a file that cannot be read, and for what is no key.
    """
    if api_key is None:
        return ""
    if not isinstance(api_key, str):
        raise invalid("api_key", f"expected a string, got a value of type {type(api_key).__name__}")
    file = api_key[1:] if api_key.startswith("@") else None
    found = api_key if file is None else _read(file)
    if not _KEY.fullmatch(found):
        expected = "expected a key, or @FILE" if file is None else f"there is no key in {file!r}"
        raise invalid("api_key", f"{expected}; a key has 1 to {_LONGEST} characters of ASCII and no blank")
    if file is None and os.path.isfile(found):
        raise invalid("api_key", "this is the name of a file; @FILE stands for the key in it")
    return found


def of_environment() -> str | None:
    """Return what KVBANK_API_KEY says; None where it is not set, or empty."""
    return os.environ.get(VARIABLE) or None


def metadata(api_key: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call that carries this key; none for ""."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def _read(name: str) -> str:
    """Return the content of a file without blanks at its ends."""
    path = Path(text("api_key", name))
    if name.startswith(_BEGINNINGS) and not os.path.isfile(name):
        raise invalid("api_key", "behind the @ is a key, and no name; @FILE stands for the key in a file")
    try:
        with path.open("rb") as file:
            return file.read(2 * _LONGEST).decode("ascii", "replace").strip()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise invalid("api_key", f"cannot read {str(path)!r}: {why}") from None
