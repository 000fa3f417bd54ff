"""Tests of payloads in a bucket. The service is real and in memory; what fails, fails in a proxy before it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memory_service.domain.limits import ObjectLimits
from tests.support import bucket as s3

if why := s3.missing():
    collect_ignore_glob = ["*"]
    pytest.skip(f"payloads in S3 cannot be tested here: {why}", allow_module_level=True)

from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.location import Location
from memory_service.storage.s3.objects import S3Objects
from memory_service.storage.s3.opening import open_objects

# Patience enough for a busy machine where a request succeeds in the end, and none to wait for.
QUICK = ObjectLimits(first_pause_s=0.001, longest_pause_s=0.01)


@pytest.fixture
def bucket() -> Bucket:
    """Speak to a bucket, below a prefix of the test's own."""
    url = s3.endpoint()
    return Bucket(Location(s3.NAME, s3.new_prefix()), QUICK, url)


@pytest.fixture
def proxy() -> Iterator[s3.Faulty]:
    """Set a proxy before the service."""
    with s3.faulty() as made:
        yield made


@pytest.fixture
def through(bucket: Bucket, proxy: s3.Faulty) -> Callable[..., Bucket]:
    """Speak to the bucket of the test through the proxy."""
    return lambda limits=QUICK: Bucket(bucket.location, limits, proxy.url)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., S3Objects]]:
    """Open the payloads of a store in a bucket, with a cache in a folder of the test."""
    made = []

    def open_at(bucket: Bucket, cache_bytes: int = 1 << 24, store: str = "of this test") -> S3Objects:
        made.append(open_objects(bucket, store, tmp_path / "cache", cache_bytes))
        return made[-1]

    yield open_at
    for objects in made:
        objects.close()
