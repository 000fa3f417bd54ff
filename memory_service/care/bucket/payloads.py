"""The payloads of a backup in a bucket, as both ends of a transfer.

This file owns that the key of an object names its bytes: it has the checksums that the descriptor of the payload says.
So what is in a list of the bucket with its size was verified when it was sent, and is not read again; an id that a
folder which was put back to an earlier time has given twice has two objects; and a backup that is being brought up to
date takes nothing from the one that is there. What has no such key is not of a backup, and is never deleted.
"""

import re
import struct
from collections.abc import Callable, Iterator, Sequence

import xxhash

from memory_service.care import payload_file
from memory_service.care.entries import Entry
from memory_service.care.folder import Folder
from memory_service.care.report import Kind
from memory_service.storage.base import DamagedError
from memory_service.storage.s3.bucket import Bucket, Listed

_PREFIX = "payloads"
_KEY = re.compile(rf"{_PREFIX}/[^/]+/[0-9]{{20}}-[0-9a-f]{{16}}")


def key(entry: Entry) -> str:
    """Return the key of the object of a chunk. Keys are in the order of bank uids and chunk ids."""
    payload = entry.payload
    assert payload is not None
    checksums = (payload.seed, payload.header_checksum or 0, *(tensor.checksum for tensor in payload.tensors))
    said = struct.pack(f"<{len(checksums) + 1}Q", payload.file_length, *checksums)
    return f"{_PREFIX}/{entry.bank.uid}/{entry.chunk_id:020d}-{xxhash.xxh3_64_hexdigest(said)}"


class ObjectsRead:
    """Implements `memory_service.care.transfer.Origin` for a backup in a bucket."""

    def __init__(self, bucket: Bucket, check_same: Callable[[], None]) -> None:
        """Read the objects of a backup. check_same: raises an OSError where the backup is another one by now."""
        self._bucket, self._check_same = bucket, check_same

    def read(self, entry: Entry) -> bytes:
        """Return the object of a chunk, verified; see `Origin.read`."""
        assert entry.payload is not None
        data = self._bucket.whole(key(entry))
        payload_file.verify(data, entry.bank.uid, entry.chunk_id, entry.payload)
        return data

    def trouble(self, entry: Entry, error: DamagedError | OSError) -> tuple[Kind, str]:
        """Say what is wrong with an object; see `Origin.trouble`."""
        if isinstance(error, DamagedError):
            return "payload_damaged", str(error)
        if isinstance(error, FileNotFoundError):
            self._check_same()
            return "payload_missing", "its object is missing"
        raise error  # of the bucket


class ObjectsMade:
    """Implements `memory_service.care.transfer.Destination` for a backup in a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        """Make objects in a bucket; nothing is asked yet."""
        self._bucket, self.threads = bucket, bucket.limits.requests
        self._listed = self._list()
        self._next: Listed | None = None
        self._begun = False
        self._there: set[str] = set()
        # The keys of payloads that the list had and that no chunk has, as far as the chunks have come.
        self._unnamed: list[str] = []

    def _list(self) -> Iterator[Listed]:
        for page in self._bucket.pages(_PREFIX):
            yield from page

    def expect(self, page: Sequence[Entry]) -> None:
        """Find in the list what is there of a page; see `Destination.expect`."""
        self._there = {wanted for entry in page if self._is_listed(wanted := key(entry), entry)}

    def _is_listed(self, wanted: str, entry: Entry) -> bool:
        found = self._go_to(wanted)
        assert entry.payload is not None
        return found is not None and found.size == entry.payload.file_length

    def _go_to(self, wanted: str | None) -> Listed | None:
        """Go on in the list beyond a key, None for its end, and return the object of the key, if there is one."""
        if not self._begun:
            self._begun, self._next = True, next(self._listed, None)
        found = None
        while (item := self._next) is not None and (wanted is None or item.key <= wanted):
            if item.key == wanted:
                found = item
            elif _KEY.fullmatch(item.key):
                self._unnamed.append(item.key)
            self._next = next(self._listed, None)
        return found

    def there(self, entry: Entry) -> str:
        """Tell whether the object of a chunk is there; see `Destination.there`."""
        return "reused" if key(entry) in self._there else ""

    def put(self, entry: Entry, data: bytes) -> None:
        """Send the object of a chunk. Its key names its bytes, so that one which is cut short may be written over."""
        self._bucket.put(key(entry), [data])

    def tidy(self, named: Folder) -> None:
        """Do nothing, since a backup that is there needs what this one does not name; see `unnamed`."""

    def unnamed(self) -> Sequence[str]:
        """Return the keys of payloads that were there when the transfer began, and that no chunk of the transfer
        has."""
        self._go_to(None)
        return self._unnamed
