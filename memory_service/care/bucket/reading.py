"""A backup in a bucket that is read. This file owns that one which is brought up to date meanwhile is not taken for a
damaged one, since what only the backup before had is deleted then."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from memory_service.care import manifest
from memory_service.care.bucket import records
from memory_service.care.bucket.payloads import ObjectsRead
from memory_service.care.folder import DATABASE
from memory_service.care.report import CareError
from memory_service.storage.local.files.folder import MANIFEST
from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.opening import open_bucket


@contextmanager
def opened(place: str) -> Iterator[tuple[dict[str, Any], Callable[[Path], None], ObjectsRead]]:
    """Open the backup at s3://BUCKET/PREFIX until the end of the block: its manifest, what brings its database into a
    folder, and its payloads. Errors: CareError where there is none, StartError, those of the bucket."""
    bucket = open_bucket(place)
    try:
        content = read_manifest(bucket)
        if content is None:
            raise CareError(f"{bucket.location} is not a backup of kvbank: it has no {MANIFEST}")
        yield content, partial(_fetch, bucket, content), ObjectsRead(bucket, partial(_check_same, bucket, content))
    finally:
        bucket.close()


def read_manifest(bucket: Bucket) -> dict[str, Any] | None:
    """Read the manifest of the backup in a bucket; None where there is none. Errors: CareError for one that cannot be
    read, those of the bucket."""
    text = read_text(bucket)
    return None if text is None else parse(bucket, text)


def read_text(bucket: Bucket) -> bytes | None:
    """Read the bytes of the manifest of the backup in a bucket; None where there is none. Errors: those of the
    bucket."""
    try:
        return bucket.whole(MANIFEST)
    except FileNotFoundError:
        return None


def parse(bucket: Bucket, text: bytes) -> dict[str, Any]:
    """Return what a manifest in a bucket says. Errors: CareError for one that cannot be read."""
    content = manifest.parse(text, str(bucket.location))
    if not isinstance(content["database"].get("blocks"), list):
        raise CareError(f"{bucket.location}/{MANIFEST} cannot be read")
    return content


def _fetch(bucket: Bucket, content: dict[str, Any], folder: Path) -> None:
    try:
        records.fetch(bucket, content["database"]["blocks"], folder / DATABASE)
    except CareError:
        _check_same(bucket, content)
        raise


def _check_same(bucket: Bucket, content: dict[str, Any]) -> None:
    """Refuse to go on where the backup is another one by now. Errors: OSError, so that a restoring keeps what it has
    brought for the next run; those of the bucket."""
    if read_manifest(bucket) != content:
        raise OSError(errno.ESTALE, f"another backup was made at {bucket.location} meanwhile; begin again")
