"""A worker with a tiny model behind a real socket, over a real memory service, and the official client of OpenAI."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from transformers import LlamaForCausalLM

from memory_service.api.embedded import LocalServer
from model_worker.http.server import Server
from model_worker.model import MemoryModel
from model_worker.serve.served import Bounds, Served
from tests.support.tcp_proxy import TcpProxy
from tests.worker_session.conftest import save_model

CHUNK, WINDOW = 16, 48
MODEL = "tiny"


class Running:
    """A worker that serves in a thread of this process."""

    def __init__(
        self,
        served: Served,
        load: Callable[[], MemoryModel],
        grace: float = 30.0,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        self.served = served
        self._loaded = threading.Event()
        self.server = Server(served, load, ready=self._loaded.set, grace=grace, tls=tls)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self._socket]))

    def loaded(self) -> "Running":
        assert self._loaded.wait(120)
        return self

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def wait(self) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        self.server.should_exit = True
        self.wait()
        self.served.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model that does not end its answers."""
    return save_lasting_model(tmp_path_factory.mktemp("model"))


def save_lasting_model(folder: Path) -> Path:
    """Save a tiny model that does not end its answers: the token that would is never the likeliest."""
    save_model(folder, seed=1)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id].zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = LocalServer(tmp_path_factory.mktemp("data"), listen="127.0.0.1:0", durability="os")
    yield server.address
    server.stop()


@pytest.fixture(scope="session")
def serving(model_folder: Path, address: str) -> Callable[..., Any]:
    """Return what starts a worker, for the time of a block."""

    @contextmanager
    def served(**options: Any) -> Iterator[Running]:
        target, hold = options.pop("target", address), options.pop("hold", None)
        grace = options.pop("grace", 30.0)
        bounds = Bounds(**{"new_tokens": 4096, **options.pop("bounds", {})})
        made = Served(MODEL, target, bounds=bounds, **options)

        def load() -> MemoryModel:
            if hold is not None:
                hold.wait(60)
            return MemoryModel.from_pretrained(
                str(model_folder), memory=made.clients.target, bank=(), chunk=CHUNK, window=WINDOW
            )

        running = Running(made, load, grace)
        try:
            yield running
        finally:
            running.stop()

    return served


@pytest.fixture(scope="session")
def worker(serving: Callable[..., Any]) -> Iterator[Running]:
    with serving(own_only=True) as running:
        yield running.loaded()


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["alone", "two"])
def workers(request: pytest.FixtureRequest, worker: Running, serving: Callable[..., Any]) -> Iterator[list[Running]]:
    """Return workers of one service: one of them, or two."""
    with ExitStack() as stack:
        others = [stack.enter_context(serving()).loaded() for _ in range(request.param - 1)]
        yield [worker, *others]


@pytest.fixture(scope="module")
def door(workers: list[Running]) -> Iterator[str]:
    """Return the address of the workers, behind a round-robin where they are two."""
    if len(workers) == 1:
        yield workers[0].url
        return
    with TcpProxy(*(running.port for running in workers)) as balancer:
        yield f"http://127.0.0.1:{balancer.port}"


@pytest.fixture
def api(door: str) -> Iterator[openai.OpenAI]:
    """Return a client of all workers, each request of which is a connection of its own."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    with openai.OpenAI(
        base_url=f"{door}/v1", api_key="none", max_retries=0, http_client=openai.DefaultHttpxClient(limits=limits)
    ) as client:
        yield client


@pytest.fixture
def client(worker: Running) -> Iterator[openai.OpenAI]:
    with worker.client() as client:
        yield client
