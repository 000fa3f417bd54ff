"""A backup in a bucket that is read."""

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
        yield content, partial(_fetch, bucket, content), ObjectsRead(bucket)
    finally:
        bucket.close()


def read_manifest(bucket: Bucket) -> dict[str, Any] | None:
    """Return the manifest of the backup in a bucket; None where there is none. Errors: CareError for one that cannot be
    read, those of the bucket."""
    try:
        text = bucket.whole(MANIFEST)
    except FileNotFoundError:
        return None
    content = manifest.parse(text, str(bucket.location))
    if not isinstance(content["database"].get("blocks"), list):
        raise CareError(f"{bucket.location}/{MANIFEST} cannot be read")
    return content


def _fetch(bucket: Bucket, content: dict[str, Any], folder: Path) -> None:
    records.fetch(bucket, content["database"]["blocks"], folder / DATABASE)
