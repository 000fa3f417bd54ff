"""A backup in the making in a bucket. This file owns the order: payloads and blocks of the records first, then the
manifest, which is one object and makes the backup whole, and only then what no manifest names any more is deleted. A
run that ends before its manifest leaves the backup of the run before as it was, and what it has sent is there for the
next one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from memory_service.care.bucket import records
from memory_service.care.bucket.payloads import ObjectsMade
from memory_service.care.bucket.reading import parse, read_text
from memory_service.care.folder import DATABASE
from memory_service.care.report import CareError
from memory_service.care.target import Target
from memory_service.storage.local.files.folder import MANIFEST
from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.opening import open_bucket


@contextmanager
def made(place: str, store_id: str) -> Iterator[Target]:
    """Begin a backup at s3://BUCKET/PREFIX, or the next one there, until the end of the block. store_id: that of the
    folder which is copied. Errors: CareError where the backup of another store is there, StartError, those of the
    bucket."""
    bucket = open_bucket(place)
    try:
        before = read_text(bucket)
        if before is not None and parse(bucket, before)["store_id"] != store_id:
            raise CareError(f"{bucket.location} has a backup of another store; name another prefix")
        with TemporaryDirectory(prefix="kvbank-backup-") as folder:
            payloads = ObjectsMade(bucket)
            yield Target(Path(folder), payloads, lambda: _finish(bucket, Path(folder), payloads, before))
    finally:
        bucket.close()


def _finish(bucket: Bucket, folder: Path, payloads: ObjectsMade, before: bytes | None) -> None:
    """Send the records and the manifest of a folder, then delete what they do not name. Errors: CareError where another
    run has made a backup meanwhile, those of the bucket."""
    keys, old = records.put(bucket, folder / DATABASE)
    content = json.loads((folder / MANIFEST).read_text())
    content["database"]["blocks"] = list(keys)
    unnamed, text = payloads.unnamed(), (json.dumps(content, indent=2) + "\n").encode()
    try:
        bucket.replace(MANIFEST, text, before)
    except FileExistsError as error:
        raise CareError(f"another backup was made at {bucket.location} meanwhile; begin again") from error
    if read_text(bucket) == text:
        bucket.delete([*unnamed, *old])
