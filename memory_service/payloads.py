"""K-V objects: one immutable safetensors file a chunk. Owns durable writing, seeded checksums and what to do with
files that no row names.

payloads/<bank uid>/<low byte of the id>/<chunk id>.safetensors; tensors lie in descriptor order without gaps, so that
a whole chunk, and any run of neighbouring tensors, is one read.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from memory_service.domain import Payload, Tensor

SUFFIX = ".safetensors"
_SAFETENSORS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int32": "I32"}


class DamagedError(Exception):
    """The bytes of a payload are not those that were written."""


def seed(bank_uid: str, chunk_id: int) -> int:
    """Checksum seed of a chunk: with it the bytes of another chunk fail too."""
    return xxhash.xxh3_64_intdigest(f"{bank_uid}/{chunk_id}".encode())


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
        self._root = data / "payloads"
        self._quarantine = data / "quarantine"
        self._durable = durable
        # Bank uid -> a bit for each of its folders that is known to be durable. One that merely exists may be another
        # thread's, and not synced yet.
        self._durable_folders: dict[str, int] = {}
        self._root.mkdir(exist_ok=True)
        self._sync_folder(data)

    def path(self, bank_uid: str, chunk_id: int) -> Path:
        """Where the payload of a chunk lies."""
        return self._root / bank_uid / f"{chunk_id & 0xFF:02x}" / f"{chunk_id}{SUFFIX}"

    def write(self, bank_uid: str, chunk_id: int, payload: Payload, data: bytes | bytearray) -> Payload:
        """Store `data` (all tensors, in descriptor order); returns when it is durable, with offsets and checksums."""
        header = _header(bank_uid, chunk_id, payload.tensors)
        path = self.path(bank_uid, chunk_id)
        temporary = path.with_suffix(".tmp")
        self._make_folder(bank_uid, chunk_id)
        try:
            with open(temporary, "xb", buffering=0) as file:
                _write_all(file.fileno(), header)
                _write_all(file.fileno(), data)
                if self._durable:
                    os.fsync(file.fileno())
            os.rename(temporary, path)
            self._sync_folder(path.parent)
        except OSError:
            # A full disk must not keep half a chunk until the next start.
            temporary.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise
        return _described(payload, seed(bank_uid, chunk_id), len(header), data)

    def read(self, bank_uid: str, chunk_id: int, payload: Payload) -> list[bytes]:
        """Bytes of the payload's tensors, in descriptor order, one item a contiguous run; verified.

        Errors: DamagedError, FileNotFoundError.
        """
        with open(self.path(bank_uid, chunk_id), "rb", buffering=0) as file:
            return [_read_run(file.fileno(), run, payload.seed) for run in _runs(payload.tensors)]

    def unlink(self, bank_uid: str, chunk_ids: Sequence[int]) -> None:
        """Remove files; those that are not there are fine."""
        for chunk_id in chunk_ids:
            self.path(bank_uid, chunk_id).unlink(missing_ok=True)

    def quarantine(self, bank_uid: str, chunk_id: int) -> None:
        """Move a damaged file out of the way, for a person to look at."""
        folder = self._quarantine / bank_uid
        folder.mkdir(parents=True, exist_ok=True)
        path = self.path(bank_uid, chunk_id)
        if path.exists():
            os.rename(path, folder / path.name)

    def drop_bank(self, bank_uid: str) -> None:
        """Remove all files of a bank."""
        self._durable_folders.pop(bank_uid, None)
        shutil.rmtree(self._root / bank_uid, ignore_errors=True)

    def sweep(self, known: Callable[[], Mapping[str, set[int]]], below: int) -> int:
        """Remove what a crash left: temporary files, files and folders without a row, of ids less than `below`.

        `known` is asked after the folders were listed: one that a new bank makes meanwhile is not taken for a leftover.
        """
        folders = [folder for folder in self._root.iterdir() if folder.is_dir()]
        rows, removed = known(), 0
        for folder in folders:
            if folder.name not in rows:
                self.drop_bank(folder.name)
                removed += 1
                continue
            for path in folder.glob("*/*"):
                # A name that is no number is not one of ours.
                if not path.stem.isdecimal() or int(path.stem) >= below:
                    continue
                if path.suffix != SUFFIX or int(path.stem) not in rows[folder.name]:
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _make_folder(self, bank_uid: str, chunk_id: int) -> None:
        """Each new level is an entry in its parent, and as durable as that."""
        bit = 1 << (chunk_id & 0xFF)
        if self._durable_folders.get(bank_uid, 0) & bit:
            return
        folder = self.path(bank_uid, chunk_id).parent
        folder.mkdir(parents=True, exist_ok=True)
        self._sync_folder(folder.parent)
        self._sync_folder(self._root)
        # Two threads at once may lose one of their bits, which costs a sync and no more.
        self._durable_folders[bank_uid] = self._durable_folders.get(bank_uid, 0) | bit

    def _sync_folder(self, folder: Path) -> None:
        if self._durable:
            sync_folder(folder)


def _header(bank_uid: str, chunk_id: int, tensors: Sequence[Tensor]) -> bytes:
    """Length (u64 LE) and JSON, padded so that the data start on 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "kvbank.1", "bank": bank_uid, "chunk": str(chunk_id)}}
    offset = 0
    for tensor in tensors:
        place = [offset, offset + tensor.length]
        entries[tensor.name] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": tensor.shape, "data_offsets": place}
        offset += tensor.length
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _described(payload: Payload, seed_: int, offset: int, data: bytes | bytearray) -> Payload:
    """The descriptor as stored: absolute offsets, seeded checksums."""
    view, begin = memoryview(data), 0
    tensors = []
    for tensor in payload.tensors:
        checksum = xxhash.xxh3_64_intdigest(view[begin : begin + tensor.length], seed_)
        tensors.append(replace(tensor, offset=offset + begin, checksum=checksum))
        begin += tensor.length
    digests = b"".join(struct.pack("<Q", tensor.checksum) for tensor in tensors)
    return replace(payload, tensors=tuple(tensors), seed=seed_, checksum=xxhash.xxh3_64_intdigest(digests))


def _runs(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors grouped where one begins at the end of the other."""
    runs: list[list[Tensor]] = []
    for tensor in tensors:
        if runs and runs[-1][-1].offset + runs[-1][-1].length == tensor.offset:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return runs


def _read_run(descriptor: int, run: Sequence[Tensor], seed_: int) -> bytes:
    begin = run[0].offset
    data = os.pread(descriptor, run[-1].offset + run[-1].length - begin, begin)
    view = memoryview(data)
    for tensor in run:
        part = view[tensor.offset - begin : tensor.offset - begin + tensor.length]
        if len(part) != tensor.length or xxhash.xxh3_64_intdigest(part, seed_) != tensor.checksum:
            raise DamagedError(f"tensor {tensor.name} does not match its checksum")
    return data


def _write_all(descriptor: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
