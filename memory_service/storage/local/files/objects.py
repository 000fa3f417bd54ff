"""The K-V of chunks in a data folder: one immutable safetensors file a chunk. This file owns how a file is written
durably, or left to be synced with others where it is small, how one that a client has staged is taken over, and that
what is opened is the file that was written.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import xxhash

from kvbank.files import private
from kvbank.files.durable import replace, sync_folder
from kvbank.files.opening import opener
from memory_service.domain.errors import staged_file
from memory_service.domain.model import Payload
from memory_service.domain.payload import MOST_COPY, Buffer, checksums_of, described, header_of, sealed, seed
from memory_service.storage.base import Copying, DamagedError, Staged
from memory_service.storage.local.files.bank_folders import BankFolders
from memory_service.storage.local.files.layout import SUFFIX, name
from memory_service.storage.local.files.staging import FOLDER, StagedFile
from memory_service.storage.local.files.unsynced import Unsynced


class FileSource:
    """Implements `memory_service.storage.base.Source` for a payload file, which is held open."""

    __slots__ = ("_descriptor",)

    def __init__(self, path: str) -> None:
        """Open the file of this path. Errors: DamagedError where a link is in its place, FileNotFoundError."""
        self._descriptor: int | None = None
        try:
            self._descriptor = opener(path, os.O_RDONLY)
        except OSError as error:
            raise DamagedError("it is a link") if error.errno == errno.ELOOP else error from None

    def check(self, payload: Payload) -> None:
        """Check all of the file but its tensors: its length and its header. Errors: DamagedError."""
        assert self._descriptor is not None
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != payload.file_length:
            raise DamagedError(f"it is no file of {payload.file_length} bytes, but of {found.st_size}")
        header = os.pread(self._descriptor, payload.header_length, 0)
        if payload.header_checksum not in (None, xxhash.xxh3_64_intdigest(header, payload.seed)):
            raise DamagedError("its header does not match its checksum")

    def read_at(self, room: memoryview, offset: int) -> int:
        """Fill `room` with the bytes from `offset` on, and return how many there were. Errors: OSError."""
        assert self._descriptor is not None
        return _read_all(self._descriptor, room, offset)

    def close(self) -> None:
        """Close the file, unless it is closed already."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class AdoptedFile:
    """Implements `memory_service.storage.base.Adopted` for a file that a client has staged.

    data: its tensors, in memory, which its maker cannot change any more.
    """

    def __init__(self, descriptor: int, owner: tuple[str, int], payload: Payload, staged: Staged) -> None:
        """Read the tensors of an open file. owner: bank uid and chunk id. Errors: STAGED_FILE."""
        self.data = np.empty(payload.length, np.uint8).data
        if _read_all(descriptor, self.data, staged.offset) < payload.length:
            raise staged_file(staged.name, "became shorter")
        self.stored = False
        self._descriptor, self._owner, self._payload, self._offset = descriptor, owner, payload, staged.offset

    def store(self, copy: Copying) -> Payload:
        """Write the header of the object, and return the descriptor; see `Adopted.store`."""
        seed_ = seed(*self._owner)
        checksums = checksums_of(self._payload.tensors, seed_, self.data)
        header = header_of(self._owner, self._payload.tensors, copy(checksums), self._offset)
        os.pwrite(self._descriptor, header, 0)
        self.stored = True
        return described(self._payload, seed_, header, checksums)


class _NotStored(Exception):
    """The end of an adoption in which nothing was stored."""


class LocalObjects:
    """Implements `memory_service.storage.base.Objects` for a data folder. Errors: OSError where the storage fails."""

    def __init__(self, data: Path, *, durable: bool, unsynced: Unsynced | None = None) -> None:
        """Open the payloads of a data folder. durable: whether files and names are synced. unsynced: where the bytes of
        small files are held that are synced later; None where all are synced at once."""
        self.data = data
        self._durable = durable
        self._unsynced = unsynced
        self.folders = BankFolders(data, durable=durable)
        self.staging = data / FOLDER

    def waits(self, length: int) -> bool:
        """Tell whether `put` waits for the disk; see `Objects.waits`. Where nothing is durable all payloads are written
        side by side, as they come."""
        return self._unsynced is None or not self._unsynced.takes(length, self.folders.root)

    def put(self, bank_uid: str, chunk_id: int, payload: Payload, data: Buffer, copy: Copying) -> Payload:
        """Store all tensors of a chunk; see `Objects.put`. A small file is synced when its bytes are in the records.
        Errors: NotThereError."""
        header, stored = sealed((bank_uid, chunk_id), payload, data, copy)
        later = self._unsynced
        if later is not None and not later.takes(stored.file_length, self.folders.of(bank_uid)):
            later = None
        synced = self._durable and later is None
        with self._placing(bank_uid, chunk_id, synced=synced) as temporary:
            descriptor = private.opener(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                _write_all(descriptor, [header, data])
                if synced:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if later is not None:
            later.hold(chunk_id, b"".join((header, data)))
        return stored

    def make_again(self, bank_uid: str, chunk_id: int, file: bytes, *, synced: bool) -> None:
        """Make the file of a chunk of all its bytes, in the place of what is there, which stays after an error. synced:
        whether it is durable then. Errors: NotThereError."""
        with self.folders.using(bank_uid):
            self.folders.make_shard(bank_uid, chunk_id)
            replace(self._place(bank_uid, chunk_id), [file], sync="name" if synced else "nothing")

    def has(self, bank_uid: str, chunk_id: int, file: bytes) -> bool:
        """Tell whether the file of a chunk has these bytes."""
        found = np.empty(len(file) + 1, np.uint8).data
        try:
            with closing(FileSource(f"{self.data}/{name(bank_uid, chunk_id)}")) as source:
                return found[: source.read_at(found, 0)] == file
        except (OSError, DamagedError):
            return False

    @contextmanager
    def adopt(self, bank_uid: str, chunk_id: int, payload: Payload, staged: Staged) -> Iterator[AdoptedFile]:
        """Take over a file that a client has staged; see `Objects.adopt`. Errors: STAGED_FILE, NotThereError."""
        owner = (bank_uid, chunk_id)
        if (least := len(header_of(owner, payload.tensors, {}))) > staged.offset:
            raise staged_file(staged.name, f"has {staged.offset} bytes for a header of {least}")
        file = StagedFile(self.staging, *staged)
        with (
            suppress(_NotStored),
            self._placing(bank_uid, chunk_id, synced=self._durable) as temporary,
            file.taken(temporary, payload.length) as descriptor,
        ):
            adopted = AdoptedFile(descriptor, owner, payload, staged)
            yield adopted
            if not adopted.stored:
                raise _NotStored
            if self._durable:
                os.fsync(descriptor)

    @contextmanager
    def _placing(self, bank_uid: str, chunk_id: int, *, synced: bool) -> Iterator[str]:
        """Yield a temporary name; the file that the block makes there gets its right name, or is removed after an
        error. synced: whether the name is durable then."""
        # No Path, because making one takes longer than renaming the file.
        path = f"{self.data}/{name(bank_uid, chunk_id)}"
        temporary = path.removesuffix(SUFFIX) + ".tmp"
        with self.folders.using(bank_uid):
            self.folders.make_shard(bank_uid, chunk_id)
            try:
                yield temporary
                os.rename(temporary, path)
                if synced:
                    sync_folder(os.path.dirname(path))
            except BaseException:
                # A full disk must not keep half a chunk until the next start.
                for made in (temporary, path):
                    with suppress(FileNotFoundError):
                        os.unlink(made)
                raise

    def discard(self, staged: Staged) -> None:
        """Remove a staged file that is not taken over."""
        StagedFile(self.staging, *staged).discard()

    def expect(self, wanted: Iterable[tuple[str, int, Payload]]) -> None:
        """Do nothing, since a file is opened at once."""

    def open(self, bank_uid: str, chunk_id: int, payload: Payload) -> FileSource:
        """Open the file of a chunk; see `Objects.open`. Errors: DamagedError, FileNotFoundError."""
        # No Path, because making one takes longer than opening the file.
        source = FileSource(f"{self.data}/{name(bank_uid, chunk_id)}")
        try:
            source.check(payload)
        except BaseException:
            source.close()
            raise
        return source

    def delete(self, bank_uid: str, chunk_ids: Iterable[int]) -> None:
        """Delete files of a bank; those that are not there are passed over."""
        for chunk_id in chunk_ids:
            self._place(bank_uid, chunk_id).unlink(missing_ok=True)

    def there(self, bank_uid: str) -> bool:
        """Tell whether the bank's folder is the one that was marked; else a disk is missing."""
        return self.folders.present(bank_uid)

    def path(self, bank_uid: str, chunk_id: int) -> str:
        """Return the path of a chunk's file below the data folder."""
        return name(bank_uid, chunk_id)

    def exists(self, bank_uid: str, chunk_id: int) -> bool:
        """Tell whether the file of a chunk is there."""
        return self._place(bank_uid, chunk_id).exists()

    def _place(self, bank_uid: str, chunk_id: int) -> Path:
        return self.data / name(bank_uid, chunk_id)


def _read_all(descriptor: int, room: memoryview, offset: int) -> int:
    """Fill `room` with the bytes of a file from `offset` on, and return how many there were."""
    done = 0
    while done < len(room) and (count := os.preadv(descriptor, [room[done:]], offset + done)):
        done += count
    return done


def read_header(path: Path) -> bytes:
    """Read the header of a file, as far as it has one. Errors: OSError."""
    descriptor = opener(os.fspath(path), os.O_RDONLY)
    try:
        begin = os.pread(descriptor, 8, 0)
        length = int.from_bytes(begin, "little")
        return begin + os.pread(descriptor, min(length, 2 * MOST_COPY), 8)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, parts: Sequence[Buffer]) -> None:
    left = [memoryview(part) for part in parts]
    while left:
        count = os.writev(descriptor, left)
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]
