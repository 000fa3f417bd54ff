"""K-V objects: one immutable safetensors file a chunk. Owns durable writing, seeded checksums and what to do with
files that no row names.

payloads/<bank uid>/<low byte of the id>/<chunk id>.safetensors; tensors lie in descriptor order without gaps, so that
a whole chunk, and any run of neighbouring tensors, is one read.
"""

import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import xxhash

from kvbank.files import private
from kvbank.files.durable import sync_folder
from memory_service.domain.model import Payload
from memory_service.domain.payload import MOST_COPY, Buffer, Copy, checksums_of, described, header_of, seed
from memory_service.storage.base import DamagedError, NotThereError
from memory_service.storage.local.files.opening import opener
from memory_service.storage.local.files.staging import StagedFile, refusal

FOLDER = "payloads"
SUFFIX = ".safetensors"
# In the folder of all payloads and in that of each bank. Without it a folder is another than the one that was made:
# that of an empty place where a disk is not mounted.
MARK = "kvbank.payloads"
_MARK_TEXT = "kvbank keeps payloads here{}; without this file it takes the folder for a disk that is not mounted\n"
_OWNER, _OWNER_OF = ", those of bank {}", re.compile(rb", those of bank ([0-9a-f]{16});")

# What a file says of its chunk, given the checksums of its tensors.
Copying = Callable[[Sequence[int]], Copy]
# Bank uid -> ids with a payload; None for a bank that is being deleted.
Known = Mapping[str, Set[int] | None]
# Names that are ours: of the folder of a bank, its folders, their files. What has another is left alone.
_BANK, _SHARD = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"([1-9][0-9]*)\.(safetensors|tmp)")


def name(bank_uid: str, chunk_id: int) -> str:
    """Return the name of the file of a chunk, relative to its data folder."""
    return f"{FOLDER}/{bank_uid}/{chunk_id & 0xFF:02x}/{chunk_id}{SUFFIX}"


def _no_copy(_checksums: Sequence[int]) -> Copy:
    return {}


def marked(folder: Path) -> bool:
    """Tell whether a folder of payloads has its mark, and so is the one that was made for them."""
    return _owner(folder) in ("", folder.name)


def displaced(folder: Path) -> bool:
    """Tell whether a folder is by its mark that of another bank, which has no folder in the right place."""
    owner = _owner(folder)
    return owner not in (None, "", folder.name) and not marked(folder.parent / str(owner))


def _owner(folder: Path) -> str | None:
    """Return the bank that the mark of a folder names, or "" where it names none; None where there is no mark."""
    try:
        named = _OWNER_OF.search((folder / MARK).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # a mark is there, and what else is wrong with the disk shows at the files
        return ""
    return named[1].decode() if named else ""


def mark(folder: Path, *, durable: bool) -> None:
    """Put a mark into a folder. A mark that is there stays, also one that names another bank."""
    if _owner(folder) is not None:
        return
    text = _MARK_TEXT.format(_OWNER.format(folder.name) if _BANK.fullmatch(folder.name) else "")
    descriptor = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, text.encode())
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if durable:
        sync_folder(folder)


def any_in(data: Path) -> bool:
    """Tell whether a data folder has the payload of any chunk."""
    return any(path.suffix == SUFFIX for bank in banks_in(data) for _, path in files_in(bank))


def banks_in(data: Path) -> list[Path]:
    """Return the folders of banks in a data folder."""
    return [path for path in _entries(data / FOLDER) if _BANK.fullmatch(path.name) and path.is_dir()]


def files_in(bank: Path) -> Iterator[tuple[int, Path]]:
    """Chunk id and path of every file in a bank's folder, payloads (SUFFIX) and temporary ones."""
    for shard in filter(_is_shard, _entries(bank)):
        for path in _entries(shard):
            if match := _FILE.fullmatch(path.name):
                yield int(match[1]), path


def unowned_file(path: Path) -> tuple[str, int, Path] | None:
    """(Bank uid, chunk id, file) of a payload in a folder of a bank; None for anything else."""
    match = _FILE.fullmatch(path.name)
    if match is None or path.suffix != SUFFIX or not _BANK.fullmatch(path.parents[1].name) or path.is_dir():
        return None
    return path.parents[1].name, int(match[1]), path


def only_ours(bank: Path) -> bool:
    """Tell whether a bank's folder has nothing but what the service makes."""
    entries = (entry for entry in _entries(bank) if entry.name != MARK)
    return all(_is_shard(entry) and all(map(_FILE.fullmatch, os.listdir(entry))) for entry in entries)


def _is_shard(path: Path) -> bool:
    return bool(_SHARD.fullmatch(path.name)) and path.is_dir()


def _entries(folder: Path) -> list[Path]:
    """Nothing where it is gone, since a server may just have removed it."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


class Payloads:
    """The payload files of a data folder. Errors: OSError where the storage fails."""

    def __init__(self, data: Path, *, durable: bool) -> None:
        self._data = data
        self._root = data / FOLDER
        self._durable = durable
        # Bank uid -> a bit for each of its folders that is known to be durable. One that merely exists may be another
        # thread's, and not synced yet.
        self._durable_folders: dict[str, int] = {}
        private.make_folder(self._root)
        # Bank uids: whose folder this process has made; which are deleted; into which so many files are being put.
        self._begun: set[str] = set()
        self._changes = threading.Condition()
        self._dropped: set[str] = set()
        self._busy: Counter[str] = Counter()
        self._sync_folder(data)

    def path(self, bank_uid: str, chunk_id: int) -> Path:
        """Where the payload of a chunk lies."""
        return Path(self.file(bank_uid, chunk_id))

    def file(self, bank_uid: str, chunk_id: int) -> str:
        """As `path`; making a Path takes longer than opening the file."""
        return f"{self._data}/{name(bank_uid, chunk_id)}"

    def write(self, bank_uid: str, chunk_id: int, payload: Payload, data: Buffer, copy: Copying = _no_copy) -> Payload:
        """Store `data` (all tensors, in descriptor order); returns when it is durable, with offsets and checksums.

        `copy`: what the file says of its chunk, given the checksums of its tensors. Errors: NotThereError.
        """
        checksums = checksums_of(payload.tensors, seed(bank_uid, chunk_id), data)
        header = header_of((bank_uid, chunk_id), payload.tensors, copy(checksums))
        with (
            self._placing(bank_uid, chunk_id) as temporary,
            open(temporary, "xb", buffering=0, opener=private.opener) as file,
        ):
            _write_all(file.fileno(), header)
            _write_all(file.fileno(), data)
            self._sync(file.fileno())
        return described(payload, seed(bank_uid, chunk_id), header, checksums)

    def adopt(
        self,
        bank_uid: str,
        chunk_id: int,
        payload: Payload,
        staged: StagedFile,
        check: Callable[[Buffer], None],
        copy: Copying = _no_copy,
    ) -> Payload:
        """As `write`, with a file that the client has made; `check` looks at its tensors. Errors: STAGED_FILE too."""
        owner = (bank_uid, chunk_id)
        if (least := len(header_of(owner, payload.tensors, {}))) > staged.offset:
            raise refusal(staged.name, f"has {staged.offset} bytes for a header of {least}")
        with (
            self._placing(bank_uid, chunk_id) as temporary,
            staged.taken(temporary, payload.length) as descriptor,
        ):
            data = np.empty(payload.length, np.uint8).data
            if read_all(descriptor, data, staged.offset) < payload.length:
                raise refusal(staged.name, "became shorter")
            check(data)
            checksums = checksums_of(payload.tensors, seed(bank_uid, chunk_id), data)
            header = header_of(owner, payload.tensors, copy(checksums), staged.offset)
            os.pwrite(descriptor, header, 0)
            self._sync(descriptor)
        return described(payload, seed(bank_uid, chunk_id), header, checksums)

    @contextmanager
    def _placing(self, bank_uid: str, chunk_id: int) -> Iterator[Path]:
        """Yield a temporary name; the file that the block makes there gets its right name, durably, or is removed after
        an error."""
        path = self.path(bank_uid, chunk_id)
        temporary = path.with_suffix(".tmp")
        with self._using(bank_uid):
            self._make_folder(bank_uid, chunk_id)
            with self._placed(temporary, path):
                yield temporary

    @contextmanager
    def _placed(self, temporary: Path, path: Path) -> Iterator[None]:
        try:
            yield
            os.rename(temporary, path)
            self._sync_folder(path.parent)
        except BaseException:
            # A full disk must not keep half a chunk until the next start.
            temporary.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise

    @staticmethod
    def discard(staged: StagedFile) -> None:
        """Remove a staged file that is not taken over."""
        staged.discard()

    def unlink(self, bank_uid: str, chunk_ids: Sequence[int]) -> None:
        """Remove files; those that are not there are fine."""
        for chunk_id in chunk_ids:
            self.path(bank_uid, chunk_id).unlink(missing_ok=True)

    # The folders of banks

    def begin_bank(self, bank_uid: str) -> None:
        """Make the folder of a new bank, durably. Errors: NotThereError where the disk of the payloads is missing."""
        if not self.mounted():
            raise NotThereError("the folder of all payloads has no mark")
        self._begun.add(bank_uid)
        self.mark_bank(bank_uid)

    def mark_bank(self, bank_uid: str) -> None:
        """Put the mark into the folder of a bank, which is made where it is missing."""
        folder = self._root / bank_uid
        private.make_folder(folder)
        mark(folder, durable=self._durable)
        self._sync_folder(self._root)

    def mark_root(self) -> None:
        """Put the mark into the folder of all payloads."""
        mark(self._root, durable=self._durable)

    def mounted(self) -> bool:
        """Tell whether the folder of all payloads is the one that was marked."""
        return marked(self._root)

    def present(self, bank_uid: str) -> bool:
        """Tell whether the bank's folder is the one that was marked."""
        return marked(self._root / bank_uid)

    @contextmanager
    def _using(self, bank_uid: str) -> Iterator[None]:
        """Keep a bank's folder from being removed while the block puts something into it. Errors: NotThereError."""
        with self._changes:
            if bank_uid in self._dropped or not self.present(bank_uid):
                raise NotThereError(f"the folder {bank_uid} is deleted, or has no mark")
            self._busy[bank_uid] += 1
        try:
            yield
        finally:
            with self._changes:
                self._busy[bank_uid] -= 1
                if not self._busy[bank_uid]:
                    del self._busy[bank_uid]
                    self._changes.notify_all()

    def drop_bank(self, bank_uid: str) -> bool:
        """Remove all files of a bank, and its folders where nothing else is in them, once nobody puts something into
        them. Returns whether none of its files is left, which nobody knows where its disk is missing, or another bank's
        folder is in its place."""
        with self._changes:
            self._dropped.add(bank_uid)
            self._changes.wait_for(lambda: bank_uid not in self._busy)
        self._durable_folders.pop(bank_uid, None)
        folder = self._root / bank_uid
        if displaced(folder) or not (self.mounted() or self.present(bank_uid)):
            return False
        for _, path in files_in(folder):
            with suppress(OSError):
                path.unlink()
        if any(True for _ in files_in(folder)):
            return False
        self._remove_folder(folder)
        return True

    @staticmethod
    def _remove_folder(folder: Path) -> None:
        """Remove a bank's folder that has no payloads; what a person has put there stays."""
        with suppress(OSError):
            (folder / MARK).unlink(missing_ok=True)
        for emptied in (*filter(_is_shard, _entries(folder)), folder):
            with suppress(OSError):
                emptied.rmdir()

    def unowned(self, known: Callable[[], Known], below: int) -> Iterator[tuple[str, int, Path]]:
        """Yield (bank uid, chunk id, file) of every payload that no row names and whose id is less than `below`.
        Temporary files, which were never whole payloads, are removed on the way. Where the folder of no known bank is
        there, the disk of another data folder may be mounted, and nothing is yielded.

        known: returns the ids that rows name; it is called after the folders were listed, so that the folder that a new
        bank makes meanwhile is not taken for a leftover.
        """
        folders = banks_in(self._data)
        rows = known()
        if rows and not any(map(self.present, rows)):
            return
        for folder in folders:
            ids = rows.get(folder.name, frozenset())
            if ids is None or folder.name in self._begun or folder.name in self._dropped or displaced(folder):
                continue
            for chunk_id, path in files_in(folder):
                if chunk_id >= below:
                    continue
                if path.suffix != SUFFIX:
                    with suppress(OSError):
                        path.unlink()
                elif chunk_id not in ids:
                    yield folder.name, chunk_id, path

    def remove_empty(self, known: Callable[[], Known]) -> list[Path]:
        """Remove the folders of unknown banks that have no payloads, and return those that have some."""
        folders = banks_in(self._data)
        rows = known()
        left = []
        for folder in folders:
            if folder.name in rows or folder.name in self._begun:
                continue
            if any(True for _ in files_in(folder)):
                left.append(folder)
            else:
                self._remove_folder(folder)
        return left

    def _make_folder(self, bank_uid: str, chunk_id: int) -> None:
        """Make the folder of a chunk's file below that of its bank, durably."""
        bit = 1 << (chunk_id & 0xFF)
        if self._durable_folders.get(bank_uid, 0) & bit:
            return
        folder = self.path(bank_uid, chunk_id).parent
        # The folder of the bank is not made: it has its mark, or is gone.
        folder.mkdir(private.FOLDER, exist_ok=True)
        self._sync_folder(folder.parent)
        self._sync_folder(self._root)
        # Two threads at once may lose one of their bits, which costs a sync and no more.
        self._durable_folders[bank_uid] = self._durable_folders.get(bank_uid, 0) | bit

    def _sync(self, descriptor: int) -> None:
        if self._durable:
            os.fsync(descriptor)

    def _sync_folder(self, folder: Path) -> None:
        if self._durable:
            sync_folder(folder)


def check_file(descriptor: int, payload: Payload) -> None:
    """Check all of a file but its tensors: its length and its header. Errors: DamagedError."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size != payload.file_length:
        raise DamagedError(f"it is no file of {payload.file_length} bytes, but of {found.st_size}")
    header = os.pread(descriptor, payload.header_length, 0)
    if payload.header_checksum not in (None, xxhash.xxh3_64_intdigest(header, payload.seed)):
        raise DamagedError("its header does not match its checksum")


def read_all(descriptor: int, room: memoryview, offset: int) -> int:
    """Fill `room` from the place `offset` on, and return how many bytes there were."""
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


def _write_all(descriptor: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
