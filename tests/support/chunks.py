"""The one maker of chunks: tensors of a bank's spec, and what the service is sent of them, made without the SDK.

Tests that speak to the service through its stubs take `described` and `frames_of`; tests of the SDK put `tensors_of`
into a `kvbank.NewChunk`.
"""

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import xxhash
from numpy.typing import NDArray

import kvbank
from kvbank.v1 import bank_pb2, chunk_pb2
from kvbank.v1 import service_pb2 as pb

Tensors = dict[str, NDArray]
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
MESSAGE_TYPES = {
    DTYPES["bf16"]: bank_pb2.DATA_TYPE_BF16,
    DTYPES["fp16"]: bank_pb2.DATA_TYPE_FP16,
    DTYPES["fp32"]: bank_pb2.DATA_TYPE_FP32,
    np.dtype(np.int32): bank_pb2.DATA_TYPE_INT32,
}


def tensors_of(spec: kvbank.KVSpec, tokens: int, random: np.random.Generator, *, finite: bool = False) -> Tensors:
    """Make K-V of `tokens` tokens for each layer of a spec, at positions from 0 on, in the order of a payload.

    The bits are random, so that some values are NaN or infinite; with `finite`, values are normally distributed.
    """
    dtype, shape = DTYPES[spec.dtype], (spec.kv_heads, tokens, spec.head_dim)
    made: Tensors = {}
    for layer in spec.layers:
        for part in "kv":
            if finite:
                made[f"{part}.{layer}"] = random.standard_normal(shape).astype(dtype)
            else:
                raw = random.bytes(int(np.prod(shape)) * dtype.itemsize)
                made[f"{part}.{layer}"] = np.frombuffer(raw, dtype).reshape(shape)
        made[f"pos.{layer}"] = np.arange(tokens, dtype=np.int32)
    return made


def described(tensors: Mapping[str, NDArray]) -> tuple[list[chunk_pb2.TensorDescriptor], bytes]:
    """Return the descriptors of tensors, with checksums, and the bytes of all of them in that order."""
    descriptors, data = [], []
    for name, array in tensors.items():
        part = array.tobytes()
        dtype, checksum = MESSAGE_TYPES[array.dtype], xxhash.xxh3_64_intdigest(part)
        descriptors.append(
            chunk_pb2.TensorDescriptor(name=name, dtype=dtype, shape=array.shape, length=len(part), checksum=checksum)
        )
        data.append(part)
    return descriptors, b"".join(data)


def frames_of(
    chunk: chunk_pb2.Chunk, data: bytes, bank: str, *, reader: str, embedder: str, step: int = 1 << 20
) -> Iterator[pb.WriteChunksRequest]:
    """Yield what a stream of writes sends for one chunk: its header, then its bytes in frames of `step` bytes."""
    header = pb.ChunkHeader(bank=bank, reader_digest=reader, embedder_digest=embedder, chunk=chunk)
    if not chunk.HasField("payload"):
        header.reader_digest = ""
    yield pb.WriteChunksRequest(header=header)
    for begin in range(0, len(data), step):
        yield pb.WriteChunksRequest(data=data[begin : begin + step])
