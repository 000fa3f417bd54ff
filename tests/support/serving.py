"""Fixtures of a real server on a real socket; a conftest imports those that its folder uses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from tests.support.caller import Caller, frames_of
from tests.support.engines import where
from tests.support.refusals import Refusals
from tests.support.soft_tokens import spec

__all__ = ["caller", "connect", "data", "frames", "payload_path", "refused", "serving", "soft", "vectors"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def serving(data: Path | Mapping[str, Any]) -> Iterator[Callable[..., Caller]]:
    """Start a server on the folder (stopping the one before) and call it."""
    running: list[tuple[LocalServer, Caller]] = []

    def stop() -> None:
        while running:
            server, caller = running.pop()
            caller.channel.close()
            server.stop()

    def start(first_key: int = 1, **settings: Any) -> Caller:
        stop()
        server = LocalServer(**{**where(data), "durability": "os", **settings})
        running.append((server, Caller(server.address, first_key)))
        start.server = server  # type: ignore[attr-defined]
        return running[-1][1]

    start.stop = stop  # type: ignore[attr-defined]
    yield start
    stop()


@pytest.fixture
def caller(serving: Callable[..., Caller]) -> Caller:
    """Start a server with the bank "b"."""
    made = serving()
    made.create()
    return made


@pytest.fixture
def connect() -> Callable[..., Any]:
    """Call a server of another process."""

    @contextmanager
    def connected(address: str, first_key: int = 1, options: Sequence[tuple[str, Any]] = ()) -> Iterator[Caller]:
        caller = Caller(address, first_key, options)
        yield caller
        caller.channel.close()

    return connected


@pytest.fixture
def frames() -> Callable[..., Iterator[pb.WriteChunksRequest]]:
    return frames_of


@pytest.fixture
def refused() -> Refusals:
    return Refusals()


@pytest.fixture
def payload_path(data: Path) -> Callable[[int], Path]:
    """Find the one file of a chunk."""
    return lambda chunk_id: next((data / "payloads").glob(f"*/*/{chunk_id}.safetensors"))


@pytest.fixture
def vectors(caller):
    """Start a server with a bank "v" without K-V."""
    caller.create("v", layers=[])
    return caller


@pytest.fixture
def soft(serving):
    """Start a server whose bank "b" takes soft tokens."""
    made = serving()
    made.create(kv=spec())
    return made
