"""The database of a backup in a bucket: a line of blocks, each an object whose key is the checksum of its bytes. So
what has not changed since the last backup is not sent again, and no request has the whole database. What has no such
key is not of a backup, and is never deleted."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from kvbank.files import private
from memory_service.care.report import CareError
from memory_service.storage.s3.bucket import Bucket

_PREFIX = "records"
_KEY = re.compile(f"{_PREFIX}/[0-9a-f]{{32}}")
_BLOCK = 4 * 1024 * 1024
_THREADS = 4


def put(bucket: Bucket, path: Path) -> tuple[Sequence[str], Sequence[str]]:
    """Send a database that is closed, and return the keys of its blocks, in order, and those that only an earlier
    backup has. Errors: those of the bucket."""
    there = {item.key: item.size for page in bucket.pages(_PREFIX) for item in page if _KEY.fullmatch(item.key)}
    descriptor = os.open(path, os.O_RDONLY)

    def send(begin: int) -> str:
        block = os.pread(descriptor, _BLOCK, begin)
        key = f"{_PREFIX}/{xxhash.xxh3_128_hexdigest(block)}"
        if there.get(key) != len(block):
            bucket.put(key, [block])
        return key

    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            keys = list(threads.map(send, range(0, os.fstat(descriptor).st_size, _BLOCK)))
    finally:
        os.close(descriptor)
    return keys, sorted(there.keys() - set(keys))


def fetch(bucket: Bucket, keys: Sequence[str], path: Path) -> None:
    """Make a file of blocks, each compared with the checksum in its key. Errors: CareError for one that is missing or
    damaged, those of the bucket."""
    descriptor = private.opener(str(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def bring(place: int) -> None:
        try:
            block = bucket.whole(keys[place])
        except FileNotFoundError as error:
            raise CareError(f"{bucket.location} lacks {keys[place]}, a part of its records") from error
        if keys[place] != f"{_PREFIX}/{xxhash.xxh3_128_hexdigest(block)}":
            raise CareError(f"{bucket.location} has a damaged part of its records, {keys[place]}")
        os.pwrite(descriptor, block, place * _BLOCK)

    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(bring, range(len(keys))))
    finally:
        os.close(descriptor)
