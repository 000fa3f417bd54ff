"""The memory of the server stays flat whatever passes through it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbank.v1 import service_pb2 as pb
from tests.support.caller import BIG, MIB
from tests.support.service_process import Service, ServiceHost


def passed_through(service: Service, connect: Callable[..., Any], frames: Callable[..., Any], total: int) -> int:
    """Write `total` bytes to a service, in chunks of 8.5 MiB, and fetch each; return by how much the service grew since
    the first 100 MiB."""
    with connect(service.address) as caller:
        caller.create(capacity={"chunks": 10})
        chunk, data = caller.chunk(**BIG)
        before = done = 0
        while done < total:
            chunk.idempotency_key = done.to_bytes(16, "big")
            (ack,) = caller.stub.WriteChunks(frames(chunk, data, step=MIB))
            for _ in caller.stub.FetchChunks(
                pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[ack.chunk_id])
            ):
                pass
            done += len(data)
            if not before and done > 100 * MIB:
                before = service.resident_bytes()
        return service.resident_bytes() - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_memory_of_the_server_stays_flat(
    tmp_path: Path, connect: Callable[..., Any], frames: Callable[..., Any]
) -> None:
    with ServiceHost() as services:
        service = services.start(tmp_path / "data", durability="os")
        assert passed_through(service, connect, frames, 250 * MIB) < 64 * MIB
