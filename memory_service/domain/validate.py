"""The checks of what a request says of banks, chunks and tensors. This file owns the shapes that the tensors of a
payload may have."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memory_service.domain.errors import Reason, ServiceError, invalid
from memory_service.domain.model import ITEM_BYTES, NUMBER_BYTES, Bank, Chunk, Expiry, KvSpec, Metadata, Tensor

LARGEST_DIMENSION = 65_536
LARGEST_NAME = 200
# Bytes of a digest or of a word about a producer, and layers of a bank: a page of either fits in a message.
LARGEST_WORD = 1024
MOST_LAYERS = 1024
LARGEST_INT64 = 2**63 - 1
MOST_IDS = 1000
# The banks that one request names.
MOST_NAMES = 100
# The hits of all queries of a request together.
MOST_HITS = 100_000
# Bytes of a metadata map; a page of the longest fits in a message.
LARGEST_METADATA = 32 * 1024
# A thousand years, in microseconds: every time of expiry is one that a Timestamp can say.
LARGEST_TTL = 1000 * 365 * 24 * 3600 * 1_000_000
# A square of a norm from which float32, whose largest number is 3e38, is far.
_FAR_WITHIN = 1e30


def bank(new: Bank) -> None:
    """Check a bank that is to be created or updated. Errors: INVALID_FIELD."""
    name("bank.name", new.name)
    _kv(new.kv)
    _word("bank.embedding.embedder_digest", new.embedding.embedder_digest)
    metadata("bank.metadata", new.metadata)
    if not 1 <= new.embedding.dimension <= LARGEST_DIMENSION:
        raise invalid("bank.embedding.dimension", f"must be from 1 to {LARGEST_DIMENSION}")
    if new.capacity is not None and new.capacity.limit < 1:
        raise invalid("bank.capacity", "must be at least 1; leave it out for no bound")
    policy = new.policy
    if not 0 <= policy.lower <= policy.upper <= 100:
        raise invalid("bank.policy", "0 <= lower <= upper <= 100 does not hold")
    if not 0 <= policy.target <= 100:
        raise invalid("bank.policy.target", "must be from 0 to 100")
    if min(new.quota.chunks, new.quota.tokens, new.quota.bytes) < 0:
        raise invalid("bank.quota", "must not be negative; 0 means unbounded")
    _expiry("bank.expiry", new.expiry)


def name(field: str, text: str) -> None:
    """Check the name of a bank or a tenant, or a pattern of names. Errors: INVALID_FIELD."""
    if not (1 <= len(text) <= LARGEST_NAME) or not text.isprintable() or text.strip() != text:
        raise invalid(field, f"must have 1 to {LARGEST_NAME} printable characters, without blanks at the ends")


def _expiry(field: str, expiry: Expiry) -> None:
    if not 0 <= expiry.ttl <= LARGEST_TTL:
        raise invalid(f"{field}.ttl", "must be from 0 (never) to 1000 years")


def _kv(kv: KvSpec) -> None:
    metadata("bank.kv.reader_parts", kv.reader_parts)
    if kv.hidden_size < 0:
        raise invalid("bank.kv.hidden_size", "must not be negative; 0 means that the bank takes no soft tokens")
    _word("bank.kv.reader_digest", kv.reader_digest)
    if len(kv.layers) > MOST_LAYERS:
        raise invalid("bank.kv.layers", f"are {len(kv.layers)}; at most {MOST_LAYERS} are taken")
    if not kv.layers:
        if kv.hidden_size:
            raise invalid("bank.kv.hidden_size", "is for a bank with layers")
        return
    if not kv.reader_digest:
        raise invalid("bank.kv.reader_digest", "is required for a bank with layers")
    if kv.layers[0] < 0 or any(a >= b for a, b in zip(kv.layers, kv.layers[1:], strict=False)):
        raise invalid("bank.kv.layers", "must be ascending and not negative")
    if kv.kv_heads < 1 or kv.head_dim < 1:
        raise invalid("bank.kv", "kv_heads and head_dim must be at least 1")
    if kv.dtype not in ("bf16", "fp16", "fp32"):
        raise invalid("bank.kv.dtype", "must be BF16, FP16 or FP32")


def _word(field: str, text: str) -> None:
    if (size := len(text.encode())) > LARGEST_WORD:
        raise invalid(field, f"has {size} bytes; at most {LARGEST_WORD} are taken")


def metadata(field: str, pairs: Metadata) -> None:
    """Check the bytes and characters of metadata. field: the name that an error gives it. Errors: INVALID_FIELD."""
    if not pairs:
        return
    texts = [*pairs, *(value for value in pairs.values() if isinstance(value, str))]
    numbers = sum(not isinstance(value, str) for value in pairs.values())
    size = sum(len(text.encode()) for text in texts) + NUMBER_BYTES * numbers
    if size > LARGEST_METADATA:
        raise invalid(field, f"has {size} bytes; at most {LARGEST_METADATA} are taken")
    if any("\0" in text for text in texts):
        raise invalid(field, "has a NUL character: what is behind it could not be filtered by")


def names(field: str, found: Sequence[str]) -> None:
    """Check the names of banks in a request. Errors: INVALID_FIELD."""
    if not 1 <= len(found) <= MOST_NAMES:
        raise invalid(field, f"must name 1 to {MOST_NAMES} banks, names {len(found)}")
    if len(set(found)) != len(found):
        raise invalid(field, "must name each bank once")


def ids(chunk_ids: Sequence[int]) -> None:
    """Check how many chunks a request names. Errors: INVALID_FIELD."""
    if not 1 <= len(chunk_ids) <= MOST_IDS:
        raise invalid("chunk_ids", f"must have 1 to {MOST_IDS} ids")


def hits(queries: int, top_k: int) -> None:
    """Check how many hits a request asks for. Errors: INVALID_FIELD."""
    if not 1 <= top_k <= MOST_IDS:
        raise invalid("top_k", f"must be from 1 to {MOST_IDS}")
    if queries * top_k > MOST_HITS:
        text = f"{queries} queries for {top_k} chunks each are {queries * top_k} hits; at most {MOST_HITS} are taken"
        raise invalid("top_k", text)


def reader(bank_: Bank, digest: str, *, required: bool = True) -> None:
    """Check that the K-V of a bank are of the model that reads them. digest: that of the model, "" where the request
    does not state it, which it must where that is `required`. Errors: READER_MISMATCH."""
    if digest == bank_.kv.reader_digest or (not digest and not required):
        return
    _mismatch("READER_MISMATCH", f"bank {bank_.name} holds K-V of reader", bank_.kv.reader_digest, digest)


def embedder(bank_: Bank, digest: str) -> None:
    """Check that a request has vectors of the bank's embedder: those of two cannot be compared. Errors:
    EMBEDDER_MISMATCH."""
    if digest != bank_.embedding.embedder_digest:
        expected = bank_.embedding.embedder_digest
        _mismatch("EMBEDDER_MISMATCH", f"bank {bank_.name} holds embeddings of embedder", expected, digest)


def _mismatch(reason: Reason, what: str, expected: str, digest: str) -> None:
    text = f"{what} {expected!r}, the request is of {digest!r}"
    raise ServiceError(reason, text, bank_digest=expected, request_digest=digest)


def dimension(bank_: Bank, stated: int) -> None:
    """Check the dimension that a request states for its queries; 0 states none. Errors: INVALID_FIELD."""
    if stated not in (0, bank_.embedding.dimension):
        text = f"have {stated} numbers each, and the embeddings of bank {bank_.name} {bank_.embedding.dimension}"
        raise invalid("queries", text)


def vectors(data: bytes, dimension: int, field: str) -> NDArray[np.float32]:
    """Return float32 LE bytes as vectors [n, dimension]. field: the name that an error gives them. Errors:
    INVALID_FIELD, NOT_FINITE."""
    if not data or len(data) % (4 * dimension):
        raise invalid(field, f"{len(data)} bytes are not vectors of {dimension} float32")
    numbers = np.frombuffer(data, "<f4")
    matrix = numbers.reshape(-1, dimension)
    # Also refuses vectors so long that a product of two of them could leave float32. Nearly all are far from that, as
    # one sum of all squares shows, however it is rounded.
    if not np.vdot(numbers, numbers) < _FAR_WITHIN:
        squares = np.einsum("nd,nd->n", matrix, matrix, dtype=np.float64)
        if not (squares < np.finfo(np.float32).max).all():
            raise ServiceError("NOT_FINITE", f"{field} has NaN, Inf or a norm beyond float32", field=field)
    return matrix


def layers(bank_: Bank, wanted: Sequence[int]) -> None:
    """Check that a bank holds the layers that a request names. Errors: INVALID_FIELD."""
    if unknown := sorted(set(wanted) - set(bank_.kv.layers)):
        raise invalid("layers", f"bank {bank_.name} has no layer {unknown[0]}")


def chunk(bank_: Bank, new: Chunk, largest: int) -> None:
    """Check a chunk that is to be written, without its bytes of K-V. largest: the bytes that these may have.

    Errors: INVALID_FIELD, NOT_FINITE, TENSOR_MISMATCH, TOO_LARGE.
    """
    if len(new.key) != 16:
        raise invalid("chunk.idempotency_key", f"must have 16 bytes, has {len(new.key)}")
    metadata("chunk.metadata", new.metadata)
    if new.expiry is not None:
        _expiry("chunk.expiry", new.expiry)
    if new.start < 0:
        raise invalid("chunk.start", "must not be negative")
    if not 0 <= new.stored_length <= new.original_length:
        raise invalid("chunk.stored_length", "0 <= stored_length <= original_length does not hold")
    if new.token_ids and len(new.token_ids) != 4 * new.original_length:
        raise invalid("chunk.token_ids", f"{len(new.token_ids) // 4} ids for original_length {new.original_length}")
    if vectors(new.embedding, bank_.embedding.dimension, "chunk.embedding").shape[0] != 1:
        raise invalid("chunk.embedding", f"must be one vector of {bank_.embedding.dimension} float32")
    if (new.payload is not None) != bool(bank_.kv.layers):
        text = "needs a payload" if bank_.kv.layers else "holds vectors only, without a payload"
        raise _tensor_mismatch("", f"a chunk of bank {bank_.name} {text}")
    if new.payload is not None:
        producer = new.payload.producer
        for name in ("method", "version", "context", "adapter_digest"):
            _word(f"chunk.payload.producer.{name}", getattr(producer, name))
        check = _soft_tokens if new.payload.kind == "soft_tokens" else _layer_kv
        check(bank_, new, new.payload.tensors)
        size = new.payload.length
        if size > largest:
            text = f"a chunk of {size} bytes; at most {largest} are taken"
            raise ServiceError("TOO_LARGE", text, limit=largest, size=size)


def _soft_tokens(bank_: Bank, new: Chunk, tensors: Sequence[Tensor]) -> None:
    """Check that the tensors are exactly `soft`, which is as wide as the model's input embeddings and has one row for
    each stored token. Errors: TENSOR_MISMATCH, INVALID_FIELD."""
    kv = bank_.kv
    if not kv.hidden_size:
        text = f"bank {bank_.name} takes no soft tokens: it was made without a hidden size"
        raise _tensor_mismatch("soft", text)
    soft, *others = tensors
    if soft.name != "soft" or others:
        name = next((tensor.name for tensor in tensors if tensor.name != "soft"), "soft")
        raise _tensor_mismatch(name, "repeated or not soft, the one tensor of soft tokens")
    n = soft.shape[0] if soft.shape else 0
    if not 1 <= n <= new.original_length:
        raise _tensor_mismatch("soft", f"shape {soft.shape} is not [n <= original_length, hidden_size]")
    _expect(soft, [kv.dtype], [(n, kv.hidden_size)])
    if n != new.stored_length:
        raise invalid("chunk.stored_length", f"is {new.stored_length}, but there are {n} soft tokens")


def _layer_kv(bank_: Bank, new: Chunk, tensors: Sequence[Tensor]) -> None:
    """Check that the tensors are exactly k, v and pos of every layer, of one m in a layer; the largest m is the stored
    length. Errors: TENSOR_MISMATCH, INVALID_FIELD."""
    kv = bank_.kv
    by_name = {tensor.name: tensor for tensor in tensors}
    expected = {f"{kind}.{layer}" for layer in kv.layers for kind in ("k", "v", "pos")}
    if len(by_name) != len(tensors) or by_name.keys() != expected:
        name = next(iter(sorted(by_name.keys() ^ expected)), tensors[0].name)
        raise _tensor_mismatch(name, "missing, repeated or not of this bank")
    longest = 0
    for layer in kv.layers:
        key = by_name[f"k.{layer}"]
        m = key.shape[1] if len(key.shape) == 3 else 0
        if not 1 <= m <= new.original_length:
            raise _tensor_mismatch(key.name, f"shape {key.shape} is not [kv_heads, m <= original_length, head_dim]")
        for tensor in (key, by_name[f"v.{layer}"]):
            _expect(tensor, [kv.dtype], [(kv.kv_heads, m, kv.head_dim)])
        _expect(by_name[f"pos.{layer}"], ["int32"], [(m,), (kv.kv_heads, m)])
        longest = max(longest, m)
    if longest != new.stored_length:
        raise invalid("chunk.stored_length", f"is {new.stored_length}, but the longest layer has {longest} tokens")


def _expect(tensor: Tensor, dtypes: Sequence[str | None], shapes: Sequence[tuple[int, ...]]) -> None:
    if tensor.dtype not in dtypes or tensor.shape not in shapes:
        text = f"is {tensor.dtype} {list(tensor.shape)}, must be {dtypes[0]} {list(shapes[0])}"
        raise _tensor_mismatch(tensor.name, text)
    if tensor.length != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
        raise _tensor_mismatch(tensor.name, f"length {tensor.length} does not fit its shape")


def positions(tensor: Tensor, data: memoryview, original_length: int) -> None:
    """Check the positions of kept tokens: they ascend, and are within the chunk.

    data: int32 LE, of the tensor's shape. Errors: TENSOR_MISMATCH.
    """
    values = np.frombuffer(data, "<i4").reshape(tensor.shape)
    if values.min() < 0 or values.max() >= original_length:
        raise _tensor_mismatch(tensor.name, f"has positions outside 0 to {original_length - 1}")
    if (values[..., 1:] <= values[..., :-1]).any():
        raise _tensor_mismatch(tensor.name, "positions are not ascending")


def _tensor_mismatch(name: str, text: str) -> ServiceError:
    return ServiceError("TENSOR_MISMATCH", f"tensor {name}: {text}".removeprefix("tensor : "), tensor=name)
