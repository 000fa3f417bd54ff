"""One service for the whole folder; every test makes a bank of its own."""

import asyncio
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import kvbank
from kvbank.console import ending
from tests.sdk.host import Host
from tests.sdk.relay import Relay
from tests.support import command
from tests.support.chunks import tensors_of
from tests.support.service_process import ServiceHost

READER = "ab" * 32
EMBEDDER = "cd" * 32
DIMENSION = 16
KV_HEADS, HEAD_DIM, LAYERS = 2, 8, (1, 3)

MakeChunk = Callable[..., kvbank.NewChunk]


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from memory_service.api.embedded import LocalServer

    server = LocalServer(tmp_path_factory.mktemp("data"))
    yield server.address
    server.stop()


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[kvbank.Client]:
    with kvbank.connect(address) as client:
        yield client


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Return the store id that a client of either kind is told."""

    async def asynchronous(target: str, **options: Any) -> str:
        async with kvbank.connect_async(target, **options) as client:
            return (await client.server_info()).store_id

    def blocking(target: str, **options: Any) -> str:
        with kvbank.connect(target, **options) as client:
            return client.server_info().store_id

    def asked(target: str, **options: Any) -> str:

        return (
            asyncio.run(asynchronous(target, **options)) if request.param == "asyncio" else blocking(target, **options)
        )

    return asked


@pytest.fixture
def kv() -> kvbank.KVSpec:
    return kvbank.KVSpec(READER, layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)


@pytest.fixture
def embedding() -> kvbank.EmbeddingSpec:
    return kvbank.EmbeddingSpec(EMBEDDER, DIMENSION)


@pytest.fixture
def digests() -> dict[str, str]:
    return {"reader_digest": READER, "embedder_digest": EMBEDDER}


@pytest.fixture
def make_bank(client: kvbank.Client, embedding: kvbank.EmbeddingSpec) -> Callable[..., str]:
    """Make a new bank: of the tests' K-V spec in `dtype`, or of vectors only with dtype=None."""

    def make(dtype: str | None = "bf16", **options: object) -> str:
        name = f"bank-{uuid.uuid4().hex}"
        kv = kvbank.KVSpec(READER, LAYERS, KV_HEADS, HEAD_DIM, dtype) if dtype else None
        client.create_bank(name, kv=kv, embedding=embedding, **options)  # type: ignore[arg-type]
        return name

    return make


@pytest.fixture
def make_chunk() -> MakeChunk:
    """Chunk `i`, whose embedding is the unit vector `i`; payload of `tokens` tokens, or none with dtype=None."""

    def make(i: int, dtype: str | None = "bf16", tokens: int = 4, **options: object) -> kvbank.NewChunk:
        spec = kvbank.KVSpec(READER, LAYERS, KV_HEADS, HEAD_DIM, dtype) if dtype else None
        tensors = tensors_of(spec, tokens, np.random.default_rng(i), finite=True) if spec else None
        options.setdefault("token_ids", range(tokens))
        return kvbank.NewChunk(unit(i), tensors, **options)  # type: ignore[arg-type]

    return make


def unit(i: int) -> np.ndarray:
    return np.eye(DIMENSION, dtype=np.float32)[i % DIMENSION]


@pytest.fixture(name="unit")
def unit_fixture() -> Callable[[int], np.ndarray]:
    return unit


@pytest.fixture
def assert_equal() -> Callable[[kvbank.Chunk, kvbank.NewChunk], None]:
    """Check that what came out is what went in, to the bit."""

    def check(found: kvbank.Chunk, new: kvbank.NewChunk) -> None:
        assert found.tensors is not None
        expected = new.tensors or {}
        assert found.tensors.keys() == expected.keys()
        for name, array in expected.items():
            assert found.tensors[name].dtype == array.dtype
            assert found.tensors[name].shape == array.shape
            assert found.tensors[name].tobytes() == array.tobytes()

    return check


@pytest.fixture
def unused_port() -> Iterator[int]:
    """Give a port that is bound and does not listen, so that connections are refused and no other process takes it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        yield listener


class Killable:
    """A service in a process of its own, on a port that it keeps over restarts."""

    def __init__(self, host: ServiceHost, data: Path) -> None:
        self._host, self._data = host, data
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.start()

    def start(self) -> None:
        """Start and wait until it answers."""
        self._service = self._host.start(self._data, listen=self.address)

    def kill(self) -> None:
        self._service.kill()


@pytest.fixture(scope="module")
def killable(services: ServiceHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killable]:
    made = Killable(services, tmp_path_factory.mktemp("killable"))
    yield made
    made.kill()


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run the console script's function with these arguments."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["kvbank", *arguments])
        with pytest.raises(SystemExit) as ended:
            ending.run(command.application())
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def host(tmp_path: Path, kv: kvbank.KVSpec, embedding: kvbank.EmbeddingSpec, digests: dict[str, str]) -> Iterator[Host]:
    host = Host(tmp_path / "data", kv, embedding, digests)
    yield host
    host.close()


@pytest.fixture
def relay(host: Host) -> Iterator[Relay]:
    """Give a relay to the server; direct calls, which would pass it by, find no socket."""
    (host.data / "direct.sock").unlink()
    with closing(Relay(host.address)) as relay:
        yield relay
