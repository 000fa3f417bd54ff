"""The door to payloads in a bucket, for engines. This file owns that the library is only needed where it is used."""

from pathlib import Path
from typing import TYPE_CHECKING

from memory_service.domain.errors import StartError
from memory_service.domain.limits import OBJECTS, ObjectLimits
from memory_service.storage.s3.cache import PayloadCache
from memory_service.storage.s3.location import parse

if TYPE_CHECKING:
    from memory_service.storage.s3.bucket import Bucket
    from memory_service.storage.s3.objects import S3Objects


def open_bucket(place: str, limits: ObjectLimits = OBJECTS, endpoint: str = "") -> "Bucket":
    """Open a place of objects, s3://BUCKET/PREFIX; nothing is asked yet. endpoint: the URL of the service, that of the
    environment where it is empty. Errors: StartError."""
    location = parse(place)
    try:
        from memory_service.storage.s3.bucket import Bucket
    except ImportError as error:
        raise StartError(f"{location} needs obstore: pip install 'kvbank[s3]'") from error
    return Bucket(location, limits, endpoint)


def open_objects(bucket: "Bucket", store_id: str, cache: Path, cache_bytes: int) -> "S3Objects":
    """Open the payloads of a store in a bucket. cache: a folder for those that were read, of `cache_bytes` at most.
    Errors: FolderInUse, OSError."""
    from memory_service.storage.s3.objects import S3Objects

    return S3Objects(bucket, PayloadCache(cache, cache_bytes), store_id)
