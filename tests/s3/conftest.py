"""Tests of payloads in a bucket. The service is real and in memory; what fails, fails in a proxy before it."""

from collections.abc import Callable, Iterator

import pytest

from memory_service.domain.limits import ObjectLimits
from tests.support import bucket as s3

if why := s3.missing():
    collect_ignore_glob = ["*"]
    pytest.skip(f"payloads in S3 cannot be tested here: {why}", allow_module_level=True)

from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.location import Location

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
