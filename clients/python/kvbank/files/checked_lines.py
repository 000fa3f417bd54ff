"""Records are kept as lines of JSON here, each with a checksum of its content and its place in the file."""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

_START = len('{"xxh3":"0123456789abcdef",')


def written(record: Mapping[str, Any], number: int) -> bytes:
    """Return the line of a record that is not empty. number: how many lines stand before it."""
    body = json.dumps(record, separators=(",", ":")).encode()
    return b'{"xxh3":"%s",' % xxhash.xxh3_64_hexdigest(body, seed=number).encode() + body[1:] + b"\n"


def read(line: bytes, number: int) -> dict[str, Any] | None:
    """Return the record of a line; None where its checksum is wrong, also that of its place."""
    body = b"{" + line[_START:].removesuffix(b"\n")
    check = line[9:25].decode(errors="replace")
    if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(body, seed=number) != check:
        return None
    record: dict[str, Any] = json.loads(body)
    return record
