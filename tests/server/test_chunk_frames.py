"""Frames of a write stream become chunks, in one order; without a server."""

from dataclasses import dataclass

import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service.api.streams.chunk_frames import FrameReader
from memory_service.api.streams.incoming import ChunkBytes
from memory_service.domain.errors import ServiceError

HEADER, OTHER = pb.ChunkHeader(bank="a"), pb.ChunkHeader(bank="b")


@dataclass
class Chunk:
    bytes: ChunkBytes


def chunk(length: int) -> Chunk:
    return Chunk(ChunkBytes(length))


def refused(field: str, text: str) -> pytest.RaisesExc[ServiceError]:
    why = rf"^{field}: {text}$"
    return pytest.raises(ServiceError, match=why, check=lambda error: error.reason == "INVALID_FIELD")


@pytest.mark.parametrize("size", [1, 7, 1000, 3 * 2**20])
def test_bytes_come_in_frames_of_any_size(size: int) -> None:
    data = bytes(range(251)) * 8000
    reader: FrameReader[Chunk] = FrameReader()
    assert list(reader.headers(pb.WriteChunksRequest(header=HEADER))) == [HEADER]
    begun = chunk(len(data))
    assert reader.feed(begun) is None
    parts = [data[begin : begin + size] for begin in range(0, len(data), size)] if size > 1 else [data[:1], data[1:]]
    for part in parts[:-1]:
        assert reader.feed(memoryview(part)) is None
    assert reader.feed(memoryview(parts[-1])) is begun
    assert begun.bytes.given_away() == data
    assert begun.bytes.given_away() == b""
    reader.end()


def test_chunks_without_bytes_share_a_frame() -> None:
    reader: FrameReader[Chunk] = FrameReader()
    frame = pb.WriteChunksRequest(headers=pb.ChunkHeaders(headers=[HEADER, OTHER]))
    seen = []
    for header in reader.headers(frame):
        begun = chunk(0)
        assert reader.feed(begun) is begun
        seen.append(header.bank)
    assert seen == ["a", "b"]
    for _ in reader.headers(frame):
        reader.feed(chunk(1))
        break
    assert reader.open is not None


def test_a_frame_of_headers_has_one() -> None:
    """Refuse a frame that begins no chunk, since nothing bounds how often it comes."""
    with refused("headers", "has no header"):
        next(FrameReader[Chunk]().headers(pb.WriteChunksRequest(headers=pb.ChunkHeaders())))


def test_a_chunk_with_bytes_has_a_frame_of_its_own() -> None:
    reader: FrameReader[Chunk] = FrameReader()
    headers = reader.headers(pb.WriteChunksRequest(headers=pb.ChunkHeaders(headers=[HEADER])))
    next(headers)
    reader.feed(chunk(1))
    with refused("headers", "a chunk with bytes to come has a frame of its own"):
        next(headers)


def test_what_comes_out_of_order_is_refused() -> None:
    reader: FrameReader[Chunk] = FrameReader()
    with refused("data", "bytes without a header"):
        reader.feed(memoryview(b"x"))
    reader.feed(chunk(3))
    with refused("data", "3 bytes of the chunk before are missing"):
        next(reader.headers(pb.WriteChunksRequest(header=HEADER)))
    with refused("data", "1 bytes more than the tensors have"):
        reader.feed(memoryview(b"four"))
    assert reader.feed(memoryview(b"x")) is None
    with refused("data", "the stream ended 2 bytes early"):
        reader.end()
