"""What goes with every call as gRPC metadata, which a proxy may need: the caller's own, and the key."""

import re
from collections.abc import Mapping, Sequence

from kvbank import _api_key
from kvbank._arguments import each, expected, invalid, text

Header = tuple[str, str | bytes]
_NAME = re.compile(r"[0-9a-z_.-]{1,100}")
_VALUE = re.compile(r"[ -~]{0,4096}")
# The names that gRPC and this package give themselves.
_OURS = ("grpc-", "x-request-id", "content-type", "te", "user-agent")
# The names by which a service takes keys.
_OF_KEYS = ("authorization", "api-key")


def given(metadata: Mapping[str, str | bytes] | Sequence[Header], api_key: str | None) -> tuple[Header, ...]:
    """Return the metadata of every call: those of a caller, by name or as pairs, and that of the key.

    Errors: InvalidArgument for what gRPC refuses, and for names that are given already.
    """
    pairs = list(metadata.items()) if isinstance(metadata, Mapping) else metadata
    found = tuple(each("metadata", pairs, _header))
    key = _api_key.metadata(_api_key.given(api_key))
    if key and have_key(found):
        raise invalid("metadata", "a key goes with every call already, by api_key or KVBANK_API_KEY")
    return found + key


def have_key(metadata: Sequence[Header]) -> bool:
    """Tell whether metadata show a server who calls."""
    return any(name in _OF_KEYS for name, _ in metadata)


def _header(field: str, pair: object) -> Header:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise expected(field, "pairs of a name and a value", pair)
    name, value = text(field, pair[0]), pair[1]
    if not _NAME.fullmatch(name) or name.startswith(_OURS[0]) or name in _OURS:
        raise expected(field, "names of a-z, 0-9, '_', '.' and '-' that gRPC does not use itself", name)
    if name.endswith("-bin"):
        if not isinstance(value, bytes):
            raise expected(field, f"bytes for {name}", type(value).__name__)
        return name, value
    value = text(field, value)
    if not _VALUE.fullmatch(value):
        raise invalid(field, f"the value of {name} has other characters than ASCII prints, or more than 4096")
    return name, value
