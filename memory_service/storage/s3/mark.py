"""The mark below the prefix of a store, which says whose objects these are: without it, a bucket that is configured
wrongly would make every chunk look damaged."""

import json
import secrets

from memory_service.domain.errors import StartError
from memory_service.storage.s3.bucket import Bucket

_KEY = "kvbank.store"


class StoreMark:
    """The mark of a store in a bucket."""

    def __init__(self, bucket: Bucket, store_id: str) -> None:
        """Speak of the mark of a store; nothing is asked yet."""
        self._bucket = bucket
        self._said = json.dumps({"store": store_id}).encode()

    def claim(self, *, new: bool) -> None:
        """Find the mark of this store in the bucket, or make it. new: whether the store has no objects yet, so that
        there may be none. Errors: StartError."""
        try:
            if new:
                self._bucket.put_new(_KEY, [self._said])
                self._check_made_once()
            elif not self.found():
                text = "has no payloads of this store; is it another bucket or prefix than before?"
                raise StartError(f"{self._bucket.location} {text}")
        except FileExistsError as error:
            raise StartError(f"{self._bucket.location} has the payloads of another store; name a prefix") from error
        except OSError as error:
            raise StartError(error.strerror or str(error)) from error

    def _check_made_once(self) -> None:
        """Refuse a service that does not heed the condition by which an object is never written over. Errors:
        StartError."""
        name = f"{_KEY}.{secrets.token_hex(8)}"
        self._bucket.put_new(name, [b"first"])
        try:
            self._bucket.put_new(name, [b"second"])
        except FileExistsError:
            return
        finally:
            self._bucket.delete([name])
        text = "writes over objects that are there: the service does not know If-None-Match"
        raise StartError(f"{self._bucket.location} {text}")

    def found(self) -> bool:
        """Tell whether the mark in the bucket is that of this store. Errors: those of `Bucket`."""
        try:
            return self._bucket.read(_KEY, 0, len(self._said) + 1).data == self._said
        except FileNotFoundError:
            return False
