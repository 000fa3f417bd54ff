"""The place of objects as an operator writes it: s3://BUCKET/PREFIX."""

import re
from typing import NamedTuple

from memory_service.domain.errors import StartError

SCHEME = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9_.-]+")


class Location(NamedTuple):
    """A bucket, and the prefix that all keys of one store have in it, "" where they have none."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        """Return the place as an operator writes it."""
        return SCHEME + "/".join(filter(None, self))


def parse(text: str) -> Location:
    """Read s3://BUCKET or s3://BUCKET/PREFIX. Errors: StartError."""
    bucket, _, prefix = text.removeprefix(SCHEME).partition("/")
    prefix = prefix.strip("/")
    if not text.startswith(SCHEME) or not bucket:
        raise StartError(f"{text!r} is no place of objects; write s3://BUCKET/PREFIX")
    if not _BUCKET.fullmatch(bucket):
        raise StartError(f"{bucket!r} cannot be a bucket: its name has 3 to 63 small letters, digits, dots and hyphens")
    segments = prefix.split("/") if prefix else []
    if not all(_SEGMENT.fullmatch(segment) and segment.strip(".") for segment in segments):
        raise StartError(f"the prefix {prefix!r} has other characters than letters, digits and _.-, or an empty part")
    return Location(bucket, prefix)
