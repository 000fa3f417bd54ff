"""The RPCs of the service in short words, spoken through the stubs alone."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import xxhash
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

import kvbank
from kvbank.v1 import bank_pb2, chunk_pb2, service_pb2_grpc
from kvbank.v1 import service_pb2 as pb
from tests.support import chunks
from tests.support.chunks import described, tensors_of

DIMENSION, LAYERS, HEADS, HEAD_DIM = 4, (1, 3), 2, 8
READER, EMBEDDER = "reader-a", "embedder-a"
BF16, INT32 = bank_pb2.DATA_TYPE_BF16, bank_pb2.DATA_TYPE_INT32
# One vector for each axis.
AXES = [tuple(float(i == axis) for i in range(DIMENSION)) for axis in range(DIMENSION)]
# Fields of a chunk with 8.5 MiB of K-V.
BIG = {"m": 65_536, "original_length": 65_536, "token_ids": ()}
MIB = 1024 * 1024


class Caller:
    """Short words for the RPCs; `bank` is "b" unless said otherwise."""

    def __init__(self, address: str, first_key: int = 1, options: Sequence[tuple[str, Any]] = ()) -> None:
        # The server says what is too large.
        self.channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1), *options])
        self.stub = service_pb2_grpc.MemoryServiceStub(self.channel)
        self._keys = itertools.count(first_key)
        self._random = np.random.default_rng(first_key)

    def create(self, name: str = "b", *, layers: Iterable[int] = LAYERS, **fields: Any) -> bank_pb2.Bank:
        """Create a bank of the K-V and embeddings of these tests."""
        kv = bank_pb2.KvSpec(reader_digest=READER, layers=layers, kv_heads=HEADS, head_dim=HEAD_DIM, dtype=BF16)
        if not kv.layers:
            kv = bank_pb2.KvSpec()
        spec = {"kv": kv, "embedding": bank_pb2.EmbeddingSpec(embedder_digest=EMBEDDER, dimension=DIMENSION)}
        bank = bank_pb2.Bank(name=name, **(spec | fields))
        return self.stub.CreateBank(pb.CreateBankRequest(bank=bank)).bank

    def chunk(
        self, vector: Iterable[float] = (1, 0, 0, 0), *, m: int = 3, layers: Iterable[int] = LAYERS, **fields: Any
    ) -> tuple[chunk_pb2.Chunk, bytes]:
        """Make a chunk with random bytes, under a fresh key unless one is given; return it with the bytes of its
        tensors."""
        spec = kvbank.KVSpec(READER, tuple(layers), HEADS, HEAD_DIM, "bf16") if layers else None
        tensors, data = described(tensors_of(spec, m, self._random) if spec else {})
        chunk = chunk_pb2.Chunk(
            idempotency_key=next(self._keys).to_bytes(16, "big"),
            start=100,
            original_length=5,
            stored_length=m,
            token_ids=[1, 2, 3, 4, 5],
            text="a text",
            metadata={"speaker": "a"},
            embedding=np.asarray(list(vector), "<f4").tobytes(),
        )
        if tensors:
            producer = chunk_pb2.Producer(method="none", version="1", context="isolated", measured_loss=0.0)
            kind = chunk_pb2.PAYLOAD_KIND_LAYER_KV
            chunk.payload.CopyFrom(chunk_pb2.PayloadDescriptor(kind=kind, tensors=tensors, producer=producer))
        for name, value in fields.items():
            if name == "token_ids":
                chunk.token_ids[:] = value
            elif isinstance(value, Message):
                getattr(chunk, name).CopyFrom(value)
            elif value is not None:
                setattr(chunk, name, value)
        return chunk, data

    def write(self, *chunks: tuple[chunk_pb2.Chunk, bytes], bank: str = "b") -> list[pb.WriteChunksResponse]:
        """Write chunks in frames of 50 bytes, and return the acknowledgements."""
        frames = [frame for chunk, data in chunks for frame in frames_of(chunk, data, bank)]
        return list(self.stub.WriteChunks(iter(frames)))

    def write_together(self, chunks: Iterable[tuple[chunk_pb2.Chunk, bytes]], bank: str = "b") -> list[int]:
        """Write chunks without K-V, many in a message, and return their ids; it takes a third of what `write` takes."""
        headers = [pb.ChunkHeader(bank=bank, embedder_digest=EMBEDDER, chunk=chunk) for chunk, _ in chunks]
        batches = (headers[begin : begin + 200] for begin in range(0, len(headers), 200))
        acks = self.stub.WriteChunks(pb.WriteChunksRequest(headers={"headers": batch}) for batch in batches)
        return [each.chunk_id for ack in acks for each in (ack, *ack.more)]

    def write_at_once(self, chunk: chunk_pb2.Chunk, data: bytes) -> int:
        """Write a chunk whose bytes are in one data frame; return its id."""
        (ack,) = self.stub.WriteChunks(self.frames(chunk, data))
        return ack.chunk_id

    def add(self, vector: Iterable[float] = (1, 0, 0, 0), bank: str = "b", **fields: Any) -> int:
        """Write a new chunk, and return its id."""
        return self.write(self.chunk(vector, **fields), bank=bank)[0].chunk_id

    def retrieve(
        self, vector: Iterable[float] = (1, 0, 0, 0), **fields: Any
    ) -> tuple[pb.RetrieveHeader, dict[int, bytes]]:
        """Return the header, and the bytes of each chunk that was sent."""
        request = {
            "banks": ["b"],
            "reader_digest": READER,
            "embedder_digest": EMBEDDER,
            "queries": np.asarray(vector, "<f4").tobytes(),
            **fields,
        }
        first, *rest = self.stub.Retrieve(pb.RetrieveRequest(**request))
        sent = [chunk for chunk, sent in zip(first.header.chunks, first.header.sent, strict=True) if sent]
        return first.header, split(sent, rest)

    def fetch(self, *chunk_ids: int, bank: str = "b", layers: Iterable[int] = ()) -> dict[int, bytes]:
        request = pb.FetchChunksRequest(bank=bank, reader_digest=READER, chunk_ids=chunk_ids, layers=layers)
        first, *rest = self.stub.FetchChunks(request)
        return split(first.header.chunks, rest)

    def ids(self, bank: str = "b") -> list[int]:
        chunks = self.stub.ListChunks(pb.ListChunksRequest(bank=bank, page_size=1000)).chunks
        return [chunk.chunk_id for chunk in chunks]

    def ids_of_all(self, bank: str = "b") -> list[int]:
        ids: list[int] = []
        page = pb.ListChunksResponse(next_page_token="0")
        while page.next_page_token:
            request = pb.ListChunksRequest(bank=bank, page_size=1000, page_token=page.next_page_token)
            page = self.stub.ListChunks(request)
            ids += [chunk.chunk_id for chunk in page.chunks]
        return ids

    def frames(self, chunk: chunk_pb2.Chunk, data: bytes) -> Iterator[pb.WriteChunksRequest]:
        return frames_of(chunk, data, step=len(data))

    def get(self, chunk_id: int, bank: str = "b") -> chunk_pb2.Chunk:
        return self.stub.GetChunk(pb.GetChunkRequest(bank=bank, chunk_id=chunk_id)).chunk

    def pin(self, *chunk_ids: int, pinned: bool = True, bank: str = "b") -> int:
        return self.stub.PinChunks(pb.PinChunksRequest(bank=bank, chunk_ids=chunk_ids, pinned=pinned)).found

    def update(self, bank: str = "b", **fields: Any) -> bank_pb2.Bank:
        """Change the fields of a bank that are given."""
        request = pb.UpdateBankRequest(bank=bank_pb2.Bank(name=bank, **fields), update_mask={"paths": list(fields)})
        return self.stub.UpdateBank(request).bank

    def count(self, chunk_id: int) -> int:
        return self.stub.GetChunk(pb.GetChunkRequest(bank="b", chunk_id=chunk_id)).chunk.retrieval_count

    def sample(self, name: str, **labels: str) -> float:
        """Return a figure of the service, added up over the labels that are not given."""
        samples = self.stub.GetStats(pb.GetStatsRequest()).samples
        return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())

    def usage(self, bank: str = "b") -> bank_pb2.BankUsage:
        return self.stub.GetBank(pb.GetBankRequest(name=bank)).bank.usage


def lasting(microseconds: int, *, renew: bool = False) -> bank_pb2.Expiry:
    """Return the life of a chunk. microseconds: how long it is. renew: each retrieval begins it anew."""
    ttl = Duration()
    ttl.FromMicroseconds(microseconds)
    return bank_pb2.Expiry(ttl=ttl, renew=renew)


def stored_bytes(chunk: chunk_pb2.Chunk, data: bytes) -> int:
    """Return what a chunk takes of its bank's bytes, as docs/eviction.md says."""
    vectors = len(chunk.embedding) + 4 * len(chunk.token_ids)
    words = len(chunk.text.encode()) + len(json.dumps(dict(chunk.metadata)))
    return len(data) + vectors + words + 256 + 160 * len(chunk.payload.tensors)


def frames_of(chunk: chunk_pb2.Chunk, data: bytes, bank: str = "b", step: int = 50) -> Iterator[pb.WriteChunksRequest]:
    """Yield the frames of a chunk for the reader and the embedder of these tests; many small ones."""
    return chunks.frames_of(chunk, data, bank, reader=READER, embedder=EMBEDDER, step=step)


def split(chunks: Iterable[chunk_pb2.Chunk], frames: Iterable[Any]) -> dict[int, bytes]:
    """Cut the stream of an answer into chunks, and check every tensor against its seeded checksum."""
    stream, parts = b"".join(frame.data for frame in frames), {}
    for chunk in chunks:
        size = sum(tensor.length for tensor in chunk.payload.tensors)
        parts[chunk.chunk_id], stream = stream[:size], stream[size:]
        begin = 0
        for tensor in chunk.payload.tensors:
            part = parts[chunk.chunk_id][begin : begin + tensor.length]
            assert xxhash.xxh3_64_intdigest(part, chunk.payload.seed) == tensor.checksum
            begin += tensor.length
    assert stream == b""
    return parts
