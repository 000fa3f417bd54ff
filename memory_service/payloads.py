"""K-V objects: one immutable safetensors file a chunk. Owns durable writing, seeded checksums and what to do with
files that no row names.

payloads/<bank uid>/<low byte of the id>/<chunk id>.safetensors; tensors lie in descriptor order without gaps, so that
a whole chunk, and any run of neighbouring tensors, is one read.
"""

import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from kvbank import _private
from memory_service.domain import Payload, Tensor
from memory_service.staging import StagedFile, refusal

FOLDER = "payloads"
SUFFIX = ".safetensors"
SAFETENSORS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int32": "I32"}

Buffer = bytes | bytearray | memoryview
# Names that are ours: of the folder of a bank, its folders, their files. What has another is left alone.
_BANK, _SHARD = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"([1-9][0-9]*)\.(safetensors|tmp)")


class DamagedError(Exception):
    """The bytes of a payload are not those that were written."""


def seed(bank_uid: str, chunk_id: int) -> int:
    """Checksum seed of a chunk: with it the bytes of another chunk fail too."""
    return xxhash.xxh3_64_intdigest(f"{bank_uid}/{chunk_id}".encode())


def name(bank_uid: str, chunk_id: int) -> str:
    """Of the file of a chunk, relative to its data folder."""
    return f"{FOLDER}/{bank_uid}/{chunk_id & 0xFF:02x}/{chunk_id}{SUFFIX}"


def any_in(data: Path) -> bool:
    """Whether a data folder has the payload of any chunk."""
    return any(path.suffix == SUFFIX for bank in banks_in(data) for _, path in files_in(bank))


def banks_in(data: Path) -> list[Path]:
    """The folders of banks in a data folder."""
    return [path for path in _entries(data / FOLDER) if _BANK.fullmatch(path.name) and path.is_dir()]


def files_in(bank: Path) -> Iterator[tuple[int, Path]]:
    """Chunk id and path of every file in a bank's folder, payloads (SUFFIX) and temporary ones."""
    for shard in filter(_is_shard, _entries(bank)):
        for path in _entries(shard):
            if match := _FILE.fullmatch(path.name):
                yield int(match[1]), path


def only_ours(bank: Path) -> bool:
    """Whether a bank's folder has nothing but what the service makes."""
    return all(_is_shard(shard) and all(map(_FILE.fullmatch, os.listdir(shard))) for shard in _entries(bank))


def _is_shard(path: Path) -> bool:
    return bool(_SHARD.fullmatch(path.name)) and path.is_dir()


def _entries(folder: Path) -> list[Path]:
    """Nothing where it is gone, since a server may just have removed it."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def sync_folder(folder: Path) -> None:
    """Make its entries durable: new, renamed and removed names."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Payloads:
    """The payload files of a data folder. Errors: OSError where the storage fails."""

    def __init__(self, data: Path, *, durable: bool) -> None:
        self._data = data
        self._root = data / FOLDER
        self._durable = durable
        # Bank uid -> a bit for each of its folders that is known to be durable. One that merely exists may be another
        # thread's, and not synced yet.
        self._durable_folders: dict[str, int] = {}
        _private.make_folder(self._root)
        self._sync_folder(data)

    def path(self, bank_uid: str, chunk_id: int) -> Path:
        """Where the payload of a chunk lies."""
        return Path(self.file(bank_uid, chunk_id))

    def file(self, bank_uid: str, chunk_id: int) -> str:
        """As `path`; making a Path takes longer than opening the file."""
        return f"{self._data}/{name(bank_uid, chunk_id)}"

    def write(self, bank_uid: str, chunk_id: int, payload: Payload, data: Buffer) -> Payload:
        """Store `data` (all tensors, in descriptor order); returns when it is durable, with offsets and checksums."""
        header = _header(bank_uid, chunk_id, payload.tensors)
        with (
            self._placing(bank_uid, chunk_id) as temporary,
            open(temporary, "xb", buffering=0, opener=_private.opener) as file,
        ):
            _write_all(file.fileno(), header)
            _write_all(file.fileno(), data)
            self._sync(file.fileno())
        return _described(payload, seed(bank_uid, chunk_id), header, data)

    def adopt(
        self, bank_uid: str, chunk_id: int, payload: Payload, staged: StagedFile, check: Callable[[Buffer], None]
    ) -> Payload:
        """As `write`, with a file that the client has made; `check` looks at its tensors. Errors: STAGED_FILE too."""
        header = _header(bank_uid, chunk_id, payload.tensors, staged.offset)
        if len(header) != staged.offset:
            raise refusal(staged.name, f"has {staged.offset} bytes for a header of {len(header)}")
        with (
            self._placing(bank_uid, chunk_id) as temporary,
            staged.taken(temporary, payload.length) as descriptor,
        ):
            data = np.empty(payload.length, np.uint8).data
            if read_all(descriptor, data, staged.offset) < payload.length:
                raise refusal(staged.name, "became shorter")
            check(data)
            os.pwrite(descriptor, header, 0)
            self._sync(descriptor)
        return _described(payload, seed(bank_uid, chunk_id), header, data)

    @contextmanager
    def _placing(self, bank_uid: str, chunk_id: int) -> Iterator[Path]:
        """A temporary name; what has it in the end gets the right one, durably, or is removed after an error."""
        path = self.path(bank_uid, chunk_id)
        temporary = path.with_suffix(".tmp")
        self._make_folder(bank_uid, chunk_id)
        try:
            yield temporary
            os.rename(temporary, path)
            self._sync_folder(path.parent)
        except BaseException:
            # A full disk must not keep half a chunk until the next start.
            temporary.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise

    def unlink(self, bank_uid: str, chunk_ids: Sequence[int]) -> None:
        """Remove files; those that are not there are fine."""
        for chunk_id in chunk_ids:
            self.path(bank_uid, chunk_id).unlink(missing_ok=True)

    def present(self, bank_uid: str) -> bool:
        """Whether the bank's folder is there at all."""
        return (self._root / bank_uid).is_dir()

    def drop_bank(self, bank_uid: str) -> int:
        """Remove all files of a bank, and its folders where nothing else is in them; how many files."""
        self._durable_folders.pop(bank_uid, None)
        folder, removed = self._root / bank_uid, 0
        for _, path in files_in(folder):
            with suppress(OSError):
                path.unlink()
                removed += 1
        for emptied in (*filter(_is_shard, _entries(folder)), folder):
            with suppress(OSError):
                emptied.rmdir()
        return removed

    def sweep(self, known: Callable[[], Mapping[str, set[int]]], below: int) -> int:
        """Remove what a crash left: temporary files, files and banks' folders without a row, of ids less than `below`.

        `known` is asked after the folders were listed: one that a new bank makes meanwhile is not taken for a leftover.
        """
        folders = banks_in(self._data)
        rows, removed = known(), 0
        for folder in folders:
            if folder.name not in rows:
                removed += self.drop_bank(folder.name)
                continue
            for chunk_id, path in files_in(folder):
                if chunk_id < below and (path.suffix != SUFFIX or chunk_id not in rows[folder.name]):
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _make_folder(self, bank_uid: str, chunk_id: int) -> None:
        """Each new level is an entry in its parent, and as durable as that."""
        bit = 1 << (chunk_id & 0xFF)
        if self._durable_folders.get(bank_uid, 0) & bit:
            return
        folder = self.path(bank_uid, chunk_id).parent
        _private.make_folder(folder)
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


def _header(bank_uid: str, chunk_id: int, tensors: Sequence[Tensor], size: int = 0) -> bytes:
    """Length (u64 LE) and JSON, padded to `size`, and so that the data start on 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "kvbank.1", "bank": bank_uid, "chunk": str(chunk_id)}}
    offset = 0
    for tensor in tensors:
        place = [offset, offset + tensor.length]
        entries[tensor.name] = {"dtype": SAFETENSORS[tensor.dtype], "shape": tensor.shape, "data_offsets": place}
        offset += tensor.length
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = text.ljust(size - 8)
    return struct.pack("<Q", len(text)) + text


def _described(payload: Payload, seed_: int, header: bytes, data: Buffer) -> Payload:
    """The descriptor as stored: absolute offsets, seeded checksums."""
    view, begin, offset = memoryview(data), 0, len(header)
    tensors = []
    for tensor in payload.tensors:
        checksum = xxhash.xxh3_64_intdigest(view[begin : begin + tensor.length], seed_)
        tensors.append(replace(tensor, offset=offset + begin, checksum=checksum))
        begin += tensor.length
    digests = b"".join(struct.pack("<Q", tensor.checksum) for tensor in tensors)
    return replace(
        payload,
        tensors=tuple(tensors),
        seed=seed_,
        checksum=xxhash.xxh3_64_intdigest(digests),
        file_length=offset + begin,
        header_length=offset,
        header_checksum=xxhash.xxh3_64_intdigest(header, seed_),
    )


def check_file(descriptor: int, payload: Payload) -> None:
    """All of the file but its tensors: its length and its header. Errors: DamagedError."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size != payload.file_length:
        raise DamagedError(f"it is no file of {payload.file_length} bytes, but of {found.st_size}")
    header = os.pread(descriptor, payload.header_length, 0)
    if payload.header_checksum not in (None, xxhash.xxh3_64_intdigest(header, payload.seed)):
        raise DamagedError("its header does not match its checksum")


def read_all(descriptor: int, room: memoryview, offset: int) -> int:
    """Fill `room` from the place `offset`; how many bytes there were."""
    done = 0
    while done < len(room) and (count := os.preadv(descriptor, [room[done:]], offset + done)):
        done += count
    return done


def _write_all(descriptor: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
