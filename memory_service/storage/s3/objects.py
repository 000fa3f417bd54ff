"""The K-V of chunks in a bucket: one immutable object each, with the same bytes as a file of a data folder."""

import errno
from collections.abc import Iterable
from contextlib import AbstractContextManager

from memory_service.domain.errors import staged_file
from memory_service.domain.model import Payload
from memory_service.domain.payload import Buffer, sealed
from memory_service.observe.metrics import BucketFigures
from memory_service.storage.base import Adopted, Copying, NotThereError, Staged
from memory_service.storage.s3 import layout
from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.cache import PayloadCache
from memory_service.storage.s3.mark import StoreMark
from memory_service.storage.s3.source import ObjectSource, Reads


class S3Objects:
    """Implements `memory_service.storage.base.Objects` for a bucket. Errors of its methods: those of `Bucket`."""

    def __init__(self, bucket: Bucket, cache: PayloadCache, store_id: str) -> None:
        """Keep the payloads of a store in a bucket; nothing is asked yet. store_id: what the mark says."""
        self._bucket, self._cache = bucket, cache
        self._reads = Reads(bucket, cache)
        self._mark = StoreMark(bucket, store_id)

    def claim(self, *, new: bool) -> None:
        """Find the mark of this store in the bucket, or make it; see `StoreMark.claim`. Errors: StartError."""
        self._mark.claim(new=new)

    @property
    def staging(self) -> None:
        """Return None, since no client of this machine can put payloads into the bucket itself."""

    def waits(self, length: int) -> bool:
        """Return True, because a bucket takes a while to answer."""
        return True

    def put(self, bank_uid: str, chunk_id: int, payload: Payload, data: Buffer, copy: Copying) -> Payload:
        """Store all tensors of a chunk; see `Objects.put`. The object is made once: a repetition whose first try had no
        answer finds it. Errors: NotThereError, FileExistsError where another object is there."""
        header, stored = sealed((bank_uid, chunk_id), payload, data, copy)
        try:
            self._bucket.put_new(layout.key(bank_uid, chunk_id), [header, data])
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise NotThereError(str(error)) from error
            raise
        return stored

    def adopt(self, bank_uid: str, chunk_id: int, payload: Payload, staged: Staged) -> AbstractContextManager[Adopted]:
        """Refuse what a client has staged. Errors: STAGED_FILE."""
        raise staged_file(staged.name, "cannot be taken over: payloads are in a bucket")

    def discard(self, staged: Staged) -> None:
        """Do nothing, since clients cannot stage anything."""

    def expect(self, wanted: Iterable[tuple[str, int, Payload]]) -> None:
        """Begin to fetch what is about to be opened; see `Objects.expect`."""
        self._reads.expect(wanted)

    def open(self, bank_uid: str, chunk_id: int, payload: Payload) -> ObjectSource:
        """Open the tensors of a descriptor, which are verified and on this machine by then; see `Objects.open`. Errors:
        DamagedError, FileNotFoundError, Cancelled."""
        return self._reads.open(bank_uid, chunk_id, payload)

    def delete(self, bank_uid: str, chunk_ids: Iterable[int]) -> None:
        """Delete objects of a bank, and what the cache has of them; those that are not there are passed over."""
        ids = list(chunk_ids)
        self._bucket.delete(layout.key(bank_uid, chunk_id) for chunk_id in ids)
        # Behind it, when nobody can fetch them any more.
        self._cache.purge(bank_uid, ids)

    def delete_bank(self, bank_uid: str) -> None:
        """Delete all objects of a bank, and what the cache has of them."""
        for page in self._bucket.pages(layout.below(bank_uid)):
            self._bucket.delete(item.key for item in page)
        self._cache.purge(bank_uid)

    def purge(self, bank_uid: str, chunk_ids: Iterable[int] | None = None) -> None:
        """Remove what the cache of this machine has of chunks that another node has deleted; None for a whole bank."""
        self._cache.purge(bank_uid, chunk_ids)

    def purge_all(self) -> None:
        """Remove everything that the cache of this machine has."""
        for bank_uid in self._cache.banks():
            self._cache.purge(bank_uid)

    def there(self, bank_uid: str) -> bool:
        """Tell whether the bucket can be reached and has the mark of this store."""
        try:
            return self._mark.found()
        except OSError:
            return False

    def path(self, bank_uid: str, chunk_id: int) -> None:
        """Return None, since objects have no path on this machine."""

    def figures(self) -> BucketFigures:
        """Return what was done since the start, for `Metrics.show_bucket`."""
        return BucketFigures(self._reads.cached, self._reads.fetched, self._bucket.repeated, self._cache.used())

    def close(self) -> None:
        """End the reading, in which nothing is asked again, and let another process have the cache."""
        self._bucket.close()
        self._reads.close()
        self._cache.close()
