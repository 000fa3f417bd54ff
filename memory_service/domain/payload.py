"""The bytes of a payload, wherever an engine keeps them: one safetensors object a chunk, which is a header and then the
tensors in descriptor order without gaps. This file owns the checks of the bytes that a caller sends, the checksums that
are stored (seeded with the chunk, so that the bytes of another chunk fail too), and the header.

The header has what safetensors wants, the chunk that the object belongs to, and a copy of what the records say of that
chunk, so that a chunk whose row is lost can be made again from its object. The copy is left out where it does not fit:
in a file that an earlier client staged, and beyond MOST_COPY bytes.
"""

import base64
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import xxhash

from memory_service.domain import validate
from memory_service.domain.errors import ServiceError
from memory_service.domain.model import Chunk, Expiry, Payload, Producer, Tensor

Buffer = bytes | bytearray | memoryview

SAFETENSORS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int32": "I32"}
_DTYPES = {there: here for here, there in SAFETENSORS.items()}
MOST_COPY = 1024 * 1024
# `json.dumps` would make one anew for each text.
_COMPACT = json.JSONEncoder(separators=(",", ":"))
_LETTERS = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
_FIGURES = ("start", "original_length", "stored_length", "created", "pinned")

# The names of a copy's parts, and their texts.
Copy = Mapping[str, str]


def seed(bank_uid: str, chunk_id: int) -> int:
    """Return the seed of the checksums of a chunk's payload."""
    return xxhash.xxh3_64_intdigest(f"{bank_uid}/{chunk_id}".encode())


def check_bytes(chunk: Chunk, data: Buffer) -> None:
    """Check the bytes that were sent for a chunk.

    data: the tensors of its payload, in descriptor order and without gaps; the descriptor states their checksums, with
    seed 0. Errors: CHECKSUM_IN_TRANSIT, TENSOR_MISMATCH for positions that are not within the chunk, or not ascending.
    """
    view, begin = memoryview(data), 0
    for tensor in chunk.payload.tensors if chunk.payload else ():
        part = view[begin : begin + tensor.length]
        if xxhash.xxh3_64_intdigest(part) != tensor.checksum:
            text = f"the bytes of tensor {tensor.name} do not match the checksum that was sent with them"
            raise ServiceError("CHECKSUM_IN_TRANSIT", text, tensor=tensor.name)
        if tensor.name.startswith("pos."):
            validate.positions(tensor, part, chunk.original_length)
        begin += tensor.length


def checksums_of(tensors: Sequence[Tensor], seed_: int, data: Buffer) -> list[int]:
    """Compute the seeded checksums of tensors that lie in `data` in this order and without gaps."""
    view, begin, checksums = memoryview(data), 0, []
    for tensor in tensors:
        checksums.append(xxhash.xxh3_64_intdigest(view[begin : begin + tensor.length], seed_))
        begin += tensor.length
    return checksums


def described(payload: Payload, seed_: int, header: bytes, checksums: Sequence[int]) -> Payload:
    """Return the descriptor as it is stored: with offsets in the object whose header this is, and seeded checksums."""
    offset = len(header)
    tensors = []
    for tensor, checksum in zip(payload.tensors, checksums, strict=True):
        tensors.append(Tensor(tensor.name, tensor.dtype, tensor.shape, offset, tensor.length, checksum))
        offset += tensor.length
    digests = b"".join(struct.pack("<Q", checksum) for checksum in checksums)
    return replace(
        payload,
        tensors=tuple(tensors),
        seed=seed_,
        checksum=xxhash.xxh3_64_intdigest(digests),
        file_length=offset,
        header_length=len(header),
        header_checksum=xxhash.xxh3_64_intdigest(header, seed_),
    )


def sealed(
    owner: tuple[str, int], payload: Payload, data: Buffer, copy: Callable[[Sequence[int]], Copy]
) -> tuple[bytes, Payload]:
    """Return the header of an object whose tensors are `data`, and the descriptor as it is stored.

    owner: bank uid and chunk id. copy: makes the copy of the record from the checksums of the tensors.
    """
    seed_ = seed(*owner)
    checksums = checksums_of(payload.tensors, seed_, data)
    header = header_of(owner, payload.tensors, copy(checksums))
    return header, described(payload, seed_, header, checksums)


def copy_of(chunk: Chunk, digest: bytes, checksums: Sequence[int]) -> Copy:
    """Make the copy of a chunk's record. digest: that of the request; checksums: those of the tensors, as in the
    records."""
    expiry, payload = chunk.expiry or Expiry(), chunk.payload
    assert payload is not None
    said: dict[str, Any] = {name: getattr(chunk, name) for name in _FIGURES}
    said |= {"ttl": expiry.ttl, "renew": expiry.renew, "kind": payload.kind, "producer": payload.producer._asdict()}
    said |= {"metadata": dict(chunk.metadata), "key": chunk.key.hex(), "digest": digest.hex()}
    said["checksums"] = [f"{checksum:016x}" for checksum in checksums]
    copy = {
        "said": _COMPACT.encode(said),
        "text": chunk.text,
        "token_ids": base64.b64encode(chunk.token_ids).decode(),
        "embedding": base64.b64encode(chunk.embedding).decode(),
    }
    return copy | {"check": _check(copy)}


def _check(copy: Copy) -> str:
    parts = [copy[name].encode() for name in ("said", "text", "token_ids", "embedding")]
    return xxhash.xxh3_64_hexdigest(b"".join((struct.pack("<4Q", *map(len, parts)), *parts)))


def header_of(owner: tuple[str, int], tensors: Sequence[Tensor], copy: Copy, size: int = 0) -> bytes:
    """Make the header of an object: the length of the rest (u64 LE) and JSON, padded to whole 8 bytes and to `size`.

    owner: bank uid and chunk id. copy: the copy of the record, which is left out where it does not fit.
    """
    made = _header(owner, tensors, copy, size)
    return made if len(made) <= (size or MOST_COPY) else _header(owner, tensors, {}, size)


def _header(owner: tuple[str, int], tensors: Sequence[Tensor], copy: Copy, size: int) -> bytes:
    about = {"format": "kvbank.1", "bank": owner[0], "chunk": str(owner[1]), **copy}
    entries: dict[str, object] = {"__metadata__": about}
    offset = 0
    for tensor in tensors:
        place = [offset, offset + tensor.length]
        entries[tensor.name] = {"dtype": SAFETENSORS[tensor.dtype], "shape": tensor.shape, "data_offsets": place}
        offset += tensor.length
    text = _LETTERS.encode(entries).encode()
    text += b" " * (-len(text) % 8)
    text = text.ljust(size - 8)
    return struct.pack("<Q", len(text)) + text


def copied(data: bytes, owner: tuple[str, int]) -> tuple[Chunk, bytes, list[int]]:
    """Read the copy of a record in the header of a file of `owner` (bank uid, chunk id).

    Returns the chunk, whose payload is described as far as the header says it, the digest of its request, and the
    checksums of its tensors. Errors: ValueError where there is no such copy, or it is damaged.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        entries = json.loads(data[8 : 8 + length])
        copy = entries.pop("__metadata__")
        if (copy["bank"], copy["chunk"]) != (owner[0], str(owner[1])):
            raise ValueError("it is the file of another chunk")
        if copy["check"] != _check(copy):
            raise ValueError("the copy of its record is damaged")
        said = json.loads(copy["said"])
        tensors = tuple(_tensor(name, entry, 8 + length) for name, entry in entries.items())
        chunk = Chunk(
            **{name: said[name] for name in _FIGURES},
            key=bytes.fromhex(said["key"]),
            token_ids=base64.b64decode(copy["token_ids"]),
            text=copy["text"],
            metadata=said["metadata"],
            embedding=base64.b64decode(copy["embedding"]),
            payload=Payload(tensors, Producer(**said["producer"]), kind=said["kind"]),
            chunk_id=owner[1],
            expiry=Expiry(said["ttl"], said["renew"]) if said["ttl"] else None,
        )
        return chunk, bytes.fromhex(said["digest"]), [int(checksum, 16) for checksum in said["checksums"]]
    except (struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError("it has no copy of its record") from error


def _tensor(name: str, entry: Mapping[str, Any], begin: int) -> Tensor:
    first, end = entry["data_offsets"]
    return Tensor(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), begin + first, end - first, 0)  # type: ignore[arg-type]
