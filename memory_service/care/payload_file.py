"""The check of one payload file against its descriptor. This file owns what "undamaged" means for care: the header says
what the records say, the size fits, and every tensor has its seeded checksum."""

import errno
import json
import stat
import struct
from pathlib import Path

import xxhash

from kvbank.files.opening import opener
from memory_service.care.report import Kind
from memory_service.domain.model import Payload, Tensor
from memory_service.domain.payload import SAFETENSORS
from memory_service.storage.base import DamagedError


def check_size(path: Path, payload: Payload) -> None:
    """Check the kind and the size of a file, without reading it. Errors: DamagedError, OSError."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise DamagedError("in the place of its file is something else")
    # A payload has at least one tensor.
    if found.st_size != (expected := max(tensor.offset + tensor.length for tensor in payload.tensors)):
        raise DamagedError(f"its file has {found.st_size} bytes instead of {expected}")


def read(path: Path, bank_uid: str, chunk_id: int, payload: Payload) -> bytes:
    """Read a whole file, verified. Errors: DamagedError, OSError."""
    data = _bytes(path)
    verify(data, bank_uid, chunk_id, payload)
    return data


def verify(data: bytes, bank_uid: str, chunk_id: int, payload: Payload) -> None:
    """Compare the bytes of a file, or of an object, with the descriptor. Errors: DamagedError."""
    begin = _check_header(data, bank_uid, chunk_id, payload)
    if len(data) != (expected := begin + payload.length):
        raise DamagedError(f"its file has {len(data)} bytes instead of {expected}")
    view = memoryview(data)
    for tensor in payload.tensors:
        part = view[tensor.offset : tensor.offset + tensor.length]
        if xxhash.xxh3_64_intdigest(part, payload.seed) != tensor.checksum:
            raise DamagedError(f"tensor {tensor.name} does not match its checksum")


def _bytes(path: Path) -> bytes:
    """Read a whole file. A disk that fails once is asked again: a sound chunk must not be given up for that."""
    try:
        return _read(path)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    return _read(path)


def _read(path: Path) -> bytes:
    """Read a file, opened as the service opens it, which follows no link and waits for no pipe."""
    with open(path, "rb", opener=opener) as file:
        return file.read()


def trouble(path: Path, error: DamagedError | OSError) -> tuple[Kind, str]:
    """Say what is wrong with a file that could not be read. A disk that fails proves nothing about what is on it."""
    match error:
        case DamagedError():
            return "payload_damaged", str(error)
        case FileNotFoundError() | NotADirectoryError():
            return "payload_missing", "its file is missing"
        case IsADirectoryError():
            return "payload_damaged", "in the place of its file is a folder"
        case OSError(errno=errno.ELOOP) if path.is_symlink():
            return "payload_damaged", "in the place of its file is a link"
        case _:
            return "payload_unreadable", f"its file cannot be read: {error.strerror}"


def _check_header(data: bytes, bank_uid: str, chunk_id: int, payload: Payload) -> int:
    """Check the header of a file, and return where its tensors begin, in bytes. Errors: DamagedError."""
    length = 0
    try:
        (length,) = struct.unpack_from("<Q", data)
        entries = json.loads(data[8 : 8 + length])
        owner = entries.pop("__metadata__")
        owner = (owner["bank"], owner["chunk"])
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if 8 <= len(data) < 8 + length <= payload.file_length:
            raise DamagedError(f"its file has {len(data)} bytes instead of {payload.file_length}") from error
        raise DamagedError("its file has no readable header") from error
    if owner != (bank_uid, str(chunk_id)):
        raise DamagedError("its file belongs to another chunk")
    begin = 8 + int(length)
    if entries != {tensor.name: _entry(tensor, begin) for tensor in payload.tensors}:
        raise DamagedError("the header of its file does not match its descriptor")
    return begin


def _entry(tensor: Tensor, begin: int) -> dict[str, object]:
    place = [tensor.offset - begin, tensor.offset - begin + tensor.length]
    return {"dtype": SAFETENSORS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
