"""Settings in a TOML file are read here for a command, and written as the file that would give the same settings."""

import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_worker.errors import InputError
from model_worker.settings.base import Settings

_WIDTH = 100


def read_settings(path: Path) -> dict[str, Any]:
    """Return the keys and values of a TOML file. Raises InputError for one that cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8 and not TOML are ValueErrors
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def as_toml(settings: Settings) -> str:
    """Return the settings as TOML, each below its help; one that has no value stands in a comment.

    Raises InputError for text that TOML cannot hold: the name of a file that is not UTF-8.
    """
    return "\n".join(_lines(settings)) + "\n"


def _lines(settings: Settings) -> Iterator[str]:
    for name, field in type(settings).model_fields.items():
        yield from (f"# {line}" for line in textwrap.wrap(field.description or "", _WIDTH))
        value = getattr(settings, name)
        yield f"# {name} =" if value is None else f"{name} = {_value(value)}"
        yield ""


def _value(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case tuple() | list():
            return f"[{', '.join(map(_value, value))}]"
    return f'"{"".join(map(_character, str(value)))}"'


def _character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    if "\ud800" <= character <= "\udfff":
        raise InputError("the name of a file that is not UTF-8 cannot stand in TOML")
    return f"\\U{ord(character):08x}"
