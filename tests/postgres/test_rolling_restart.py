"""Services on one database that are restarted one after the other, while clients work."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import Pauses
from tests.proof.content import DIGESTS, EMBEDDING, KV, chunk_of, differences, new_key, vector_of
from tests.proof.handshakes import free_address
from tests.support.engines import ENGINES
from tests.support.waiting import wait_until

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())


class Restarted:
    """A service that keeps its address, and holds up an answer where it is told to."""

    def __init__(self, place: Mapping[str, Any], name: str) -> None:
        self._place = {**place, "cache": f"{place['cache']}-{name}", "metrics_listen": "127.0.0.1:0", "grace": 60}
        self.address = free_address()
        self.holds, self.held, self.goes_on = threading.Event(), threading.Event(), threading.Event()
        self.start()

    def start(self) -> None:
        pauses = Pauses(at={"query checked": self._pass})
        self.server = LocalServer(**self._place, listen=self.address, pauses=pauses)

    def _pass(self) -> None:
        if self.holds.is_set():
            self.holds.clear()
            self.held.set()
            self.goes_on.wait(60)

    def ready(self) -> str:
        try:
            with urllib.request.urlopen(f"http://{self.server.metrics_address}/readyz", timeout=60) as answer:
                return str(answer.read())
        except urllib.error.HTTPError as error:
            return str(error.read())


@pytest.fixture
def services(tmp_path: Path) -> Iterator[list[Restarted]]:
    with KIND.place(tmp_path) as place:
        made = [Restarted(place, name) for name in "ab"]
        yield made
        for service in made:
            service.server.stop()


def test_clients_notice_nothing_of_a_rolling_restart(services: list[Restarted]) -> None:
    """Stop each service while it answers: it says that it is not ready, finishes that answer, takes no further call."""
    target = ",".join(service.address for service in services)
    written, over = [dict[int, bytes]() for _ in range(2)], threading.Event()
    with kvbank.connect(target, spread=True) as client, ThreadPoolExecutor(3) as threads:
        client.create_bank("b", kv=KV, embedding=EMBEDDING)

        def work(mine: dict[int, bytes]) -> int:
            for calls in count():
                if over.is_set():
                    return calls
                key = new_key(tokens=2)
                mine[client.write("b", chunk_of(key), **DIGESTS).chunk_id] = key
                (found,) = client.retrieve("b", vector_of(key), top_k=1, **DIGESTS).queries
                assert found[0].chunk_id in mine or found[0].score >= 0.999
            raise AssertionError

        working = [threads.submit(work, mine) for mine in written]
        for service in services:
            service.holds.set()
            assert service.held.wait(60)
            stopping = threading.Thread(target=service.server.stop)
            stopping.start()
            wait_until(lambda service=service: "not ready\\nstopping" in service.ready())
            others = {len(mine) for mine in written}
            wait_until(lambda others=others: {len(mine) for mine in written} != others)  # elsewhere work goes on
            service.goes_on.set()
            stopping.join(60)
            service.start()
        over.set()
        assert all(done.result(60) for done in working)
        keys = {chunk_id: key for mine in written for chunk_id, key in mine.items()}
        assert client.get_bank("b").usage.chunks_written == len(keys) == sum(map(len, written))
        for chunk in client.fetch("b", sorted(keys), reader_digest=DIGESTS["reader_digest"]):
            assert chunk.idempotency_key == keys[chunk.chunk_id]
            assert differences(chunk) == []
