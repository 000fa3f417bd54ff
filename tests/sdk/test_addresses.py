"""Clients of several addresses: calls go on at another one, or are spread over all that answer.

Two services of a folder each stand for two of one database, so that an answer says where its call went.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kvbank
from tests.support import command
from tests.support.restartable import Service
from tests.support.waiting import wait_until

EMBEDDING = kvbank.EmbeddingSpec("e", 4)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Service, Service]]:
    services = Service(tmp_path / "first"), Service(tmp_path / "second")
    yield services
    for service in services:
        service.stop()


def both(two: tuple[Service, Service]) -> str:
    return ",".join(service.address for service in two)


def asked(target: str, calls: int) -> list[str]:
    """Return the store ids that a client of each kind is told, each of which spreads its calls."""

    async def asynchronous() -> list[str]:
        async with kvbank.connect_async(target, spread=True) as client:
            return [(await client.server_info()).store_id for _ in range(calls)]

    with kvbank.connect(target, spread=True) as client:
        return [client.server_info().store_id for _ in range(calls)] + asyncio.run(asynchronous())


def write(client: kvbank.Client, bank: str) -> None:
    client.create_bank(bank, kv=None, embedding=EMBEDDING, exist_ok=True)
    chunks = (kvbank.NewChunk([1, 0, 0, 0]) for _ in range(3))
    assert len(list(client.write_many(bank, chunks, reader_digest="", embedder_digest="e"))) == 3


def test_the_next_address_is_asked_when_one_is_away(
    address: str, unused_port: int, ask: Callable[..., str], client: kvbank.Client
) -> None:
    store = client.server_info().store_id
    away = f"127.0.0.1:{unused_port}"
    for target in (f"{away},{address}", f"{address},{away}", f"{away},{away},{address}"):
        assert ask(target) == ask(target, spread=True) == store
    with pytest.raises(kvbank.Unavailable, match=f"UNAVAILABLE at {away}: "):
        ask(f"{away},{away}", first_contact=0.3)
    assert store in command.run(command.application(), "ping", f"{away},{address}").output


def test_calls_stay_with_an_address_until_it_is_away(two: tuple[Service, Service]) -> None:
    ids = []
    for service in two:
        with kvbank.connect(service.address) as client:
            ids.append(client.server_info().store_id)
    with kvbank.connect(both(two)) as client:
        assert {client.server_info().store_id for _ in range(5)} == {ids[0]}
        two[0].stop()
        assert {client.server_info().store_id for _ in range(5)} == {ids[1]}
        write(client, "b")


def test_calls_that_are_spread_go_to_all_that_answer(
    two: tuple[Service, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(Counter(asked(both(two), 6)).values()) == [6, 6]
    monkeypatch.setenv("KVBANK_SPREAD", "1")
    with kvbank.connect(both(two)) as client:

        def ask(_: int = 0) -> str:
            return client.server_info().store_id

        with ThreadPoolExecutor(4) as threads:
            first, second = Counter(threads.map(ask, range(40))).values()
        assert (first, second) == (20, 20)
        two[0].stop()
        left = set(map(ask, range(9)))
        assert len(left) == 1
        write(client, "b")
        two[0].start()
        wait_until(lambda: ask() not in left)
        assert len(set(map(ask, range(4)))) == 2


def test_whether_calls_are_spread_is_yes_or_no(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kvbank.InvalidArgument, match="spread: expected True or False"):
        kvbank.connect(address, spread="yes")  # type: ignore[arg-type]
    monkeypatch.setenv("KVBANK_SPREAD", "perhaps")
    with pytest.raises(kvbank.InvalidArgument, match="KVBANK_SPREAD: expected 1 or 0, got 'perhaps'"):
        kvbank.connect(address)
    with kvbank.connect(address, spread=False) as client:
        assert client.server_info().store_id


def test_several_addresses_are_a_target() -> None:
    assert kvbank.parse_target("a:1,b:2") == "a:1,b:2"
    for target in ("a:1,", "a:1,b", "a:1,b:0", ",a:1", "a:1, b:2", "a:1,unix:x"):
        with pytest.raises(kvbank.InvalidArgument):
            kvbank.parse_target(target)
