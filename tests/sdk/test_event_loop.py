"""The asyncio client never blocks its event loop, whatever its callers, its server and its disk do meanwhile."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, suppress
from typing import Any

import numpy as np
import pytest
import xxhash

import kvbank
from kvbank._calls.writing import WriteSession
from kvbank._transport.loop import SMALL_BYTES, SMALL_COUNT, Feed
from tests.sdk.host import Host

Make = Callable[..., kvbank.NewChunk]
MakeBank = Callable[..., str]


def test_a_generator_that_blocks_does_not_stop_the_event_loop(
    address: str, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    bank, asked, go_on = make_bank(), threading.Event(), threading.Event()

    def chunks() -> Iterator[kvbank.NewChunk]:
        yield make_chunk(0)
        asked.set()
        assert go_on.wait(60), "only the event loop lets it go on"
        yield make_chunk(1)

    async def write() -> list[kvbank.WriteResult]:
        async with kvbank.connect_async(address) as client:
            writing = asyncio.create_task(client.write_many(bank, chunks(), **digests))
            while not asked.is_set():
                await client.server_info()
            go_on.set()
            return await writing

    assert len(asyncio.run(write())) == 2


def test_asynchronous_iterables_are_taken(
    address: str, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    bank = make_bank()

    async def chunks(client: kvbank.AsyncClient) -> AsyncIterator[kvbank.NewChunk]:
        for i in range(5):
            await client.server_info()
            yield make_chunk(i)

    async def write() -> list[kvbank.WriteResult]:
        async with kvbank.connect_async(address) as client:
            with pytest.raises(kvbank.InvalidArgument, match=r"^chunks: "):
                await client.write_many(bank, 5, **digests)  # type: ignore[arg-type]
            return await client.write_many(bank, chunks(client), **digests)

    assert len({result.chunk_id for result in asyncio.run(write())}) == 5
    with kvbank.connect(address) as client, pytest.raises(kvbank.InvalidArgument, match=r"^chunks: "):
        client.write_many(bank, chunks(None), **digests)  # type: ignore[arg-type]


def test_a_cancelled_write_waits_for_its_thread_and_not_the_event_loop(
    host: Host, make_chunk: Make, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage its payload on a disk that does not answer."""
    staging, go_on, write_there = threading.Event(), threading.Event(), os.pwritev

    def slow(*arguments: Any) -> int:
        staging.set()
        assert go_on.wait(60), "only the event loop lets it go on"
        return write_there(*arguments)

    monkeypatch.setattr(os, "pwritev", slow)

    async def write() -> None:
        async with kvbank.connect_async(host.address) as client:
            writing = asyncio.create_task(client.write("b", make_chunk(0), **digests))
            await asyncio.to_thread(staging.wait)
            writing.cancel()
            await client.server_info()
            assert not writing.done()
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await writing

    asyncio.run(write())
    assert not host.staged()


class Slow(Mapping[str, np.ndarray]):
    """Tensors that are not to be had before the event loop has gone on."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.asked, self.go_on = threading.Event(), threading.Event()

    def __getitem__(self, name: str) -> np.ndarray:
        self.asked.set()
        assert self.go_on.wait(60), "only the event loop lets it go on"
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_the_loop_goes_on_while_a_payload_is_prepared(
    address: str, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    bank, plain = make_bank(), make_chunk(0)
    slow = Slow(plain.tensors or {})
    chunk = kvbank.NewChunk(plain.embedding, slow, token_ids=plain.token_ids)

    async def write() -> int:
        async with kvbank.connect_async(address) as client:
            writing, turns = asyncio.create_task(client.write(bank, chunk, **digests)), 0
            while not slow.asked.is_set():
                await asyncio.sleep(0)
            for _ in range(3):
                await client.server_info()
                turns += 1
            assert not writing.done()
            slow.go_on.set()
            await writing
            return turns

    assert asyncio.run(write()) == 3


def test_large_tensors_are_summed_outside_of_the_loop(
    address: str, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look at the tensors that are written, and at those that are received and verified."""
    bank, digest = make_bank("fp32"), xxhash.xxh3_64_intdigest
    big = make_chunk(0, "fp32", tokens=65_536, token_ids=())
    summed: list[tuple[int, int]] = []

    def noted(data: Any, seed: int = 0) -> int:
        summed.append((threading.get_ident(), memoryview(data).nbytes))
        return digest(data, seed=seed)

    async def there_and_back() -> int:
        async with kvbank.connect_async(address) as client:
            written = await client.write(bank, big, **digests)
            (found,) = await client.fetch(bank, [written.chunk_id], reader_digest=digests["reader_digest"])
            assert found.tensors is not None
            assert np.array_equal(found.tensors["v.3"], (big.tensors or {})["v.3"])
            return threading.get_ident()

    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", noted)
    loop = asyncio.run(there_and_back())
    assert max(size for _, size in summed) > SMALL_BYTES
    assert [size for thread, size in summed if thread == loop and size > SMALL_BYTES] == []


def test_files_of_the_server_are_read_outside_of_the_loop(
    host: Host, make_chunk: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look at the file by which a server proves which folder it has, and at the payload."""
    (chunk_id,) = host.write(make_chunk(0))
    read: list[tuple[str, int]] = []

    def noted(name: str) -> Callable[..., Any]:
        there = getattr(os, name)

        def reading(*arguments: Any) -> Any:
            read.append((name, threading.get_ident()))
            return there(*arguments)

        return reading

    async def fetch() -> int:
        async with kvbank.connect_async(host.address) as client:
            await client.fetch("b", [chunk_id], reader_digest=host.digests["reader_digest"])
        return threading.get_ident()

    for name in ("read", "preadv"):
        monkeypatch.setattr(os, name, noted(name))
    loop = asyncio.run(fetch())
    assert {name for name, _ in read} == {"read", "preadv"}
    assert [name for name, thread in read if thread == loop] == []


@pytest.mark.parametrize(
    ("queries", "in_the_loop"),
    [(np.ones(4 * SMALL_COUNT), True), (np.ones((1, 16)), True), (np.ones((4 * SMALL_COUNT, 16)), False)],
    ids=["one long vector", "one row", "many rows"],
)
def test_a_request_of_many_vectors_alone_is_made_in_a_thread(
    address: str, make_bank: MakeBank, digests: dict[str, str], queries: np.ndarray, in_the_loop: bool
) -> None:
    """See in which thread the names of banks are taken; a thread for one vector would cost more than the vector."""
    bank, taken = make_bank(), []

    def banks() -> Iterator[str]:
        taken.append(threading.get_ident())
        yield bank

    async def retrieve() -> int:
        async with kvbank.connect_async(address) as client:
            with suppress(kvbank.InvalidArgument):  # of the server, for the long vector
                await client.retrieve(banks(), queries, **digests)
        return threading.get_ident()

    loop = asyncio.run(retrieve())
    assert (taken == [loop]) is in_the_loop


def test_more_writes_than_there_are_threads_wait_for_each_other(
    address: str, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    """Asynchronous iterators hold no thread while they wait, so that none is missing for those on whom they wait."""
    bank, count = make_bank(), 60

    async def write() -> list[list[kvbank.WriteResult]]:
        begun, all_begun = 0, asyncio.Event()

        async def chunks(number: int) -> AsyncIterator[kvbank.NewChunk]:
            nonlocal begun
            yield make_chunk(number)
            begun += 1
            if begun == count:
                all_begun.set()
            await all_begun.wait()
            yield make_chunk(number)

        async with kvbank.connect_async(address) as client:
            return await asyncio.gather(*(client.write_many(bank, chunks(i), **digests) for i in range(count)))

    results = asyncio.run(write())
    assert len({result.chunk_id for pair in results for result in pair}) == 2 * count


def test_an_asynchronous_iterator_is_asked_for_a_chunk_when_the_one_before_is_on_its_way() -> None:
    asked = 0

    async def endless() -> AsyncIterator[kvbank.NewChunk]:
        nonlocal asked
        while True:
            asked += 1
            yield kvbank.NewChunk([1.0] * 100)

    async def feed() -> None:
        session = WriteSession("b", (), "", "", bound=1)
        feed = Feed(session, endless())
        for sent in range(3):
            assert await feed.more()
            assert await feed.more()
            assert asked == sent + 1
            session.advance()
        assert not session.finished()

    asyncio.run(feed())


def test_a_write_that_is_cancelled_between_two_chunks_ends_its_iterator_and_keeps_what_was_written(
    host: Host, make_chunk: Make
) -> None:
    ended: list[str] = []

    async def chunks(waiting: asyncio.Event) -> AsyncIterator[kvbank.NewChunk]:
        try:
            for i in range(3):
                yield make_chunk(i)
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def write() -> None:
        async with kvbank.connect_async(host.address) as client:
            waiting = asyncio.Event()
            writing = asyncio.create_task(client.write_many("b", chunks(waiting), **host.digests))
            await waiting.wait()
            while (await client.get_bank("b")).usage.chunks < 3:
                await asyncio.sleep(0)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            assert ended == ["cancelled"]
            await client.write("b", make_chunk(9), **host.digests)

    asyncio.run(write())
    assert host.client.get_bank("b").usage.chunks == 4
    assert not host.staged()


def test_an_iterator_whose_chunk_is_refused_is_asked_no_more_and_left_to_its_owner(
    host: Host, make_chunk: Make
) -> None:
    given: list[int] = []

    async def chunks() -> AsyncGenerator[kvbank.NewChunk]:
        try:
            for i in range(10_000):
                given.append(i)
                yield make_chunk(i, "fp32" if i == 3 else "bf16")
        finally:
            given.append(-1)

    async def write() -> None:
        async with kvbank.connect_async(host.address) as client, aclosing(chunks()) as source:
            with pytest.raises(kvbank.InvalidArgument):
                await client.write_many("b", source, **host.digests)
            last = given[-1]
            await anext(source)
            assert given[-1] == last + 1
        assert given[-1] == -1

    asyncio.run(write())
    assert len(given) < 10_000
    assert host.client.get_bank("b").usage.chunks == 3


def test_closing_does_not_wait_in_the_loop_for_a_write(
    host: Host, make_chunk: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage its payload on a disk that does not answer."""
    staging, go_on, write_there = threading.Event(), threading.Event(), os.pwritev

    def slow(*arguments: Any) -> int:
        staging.set()
        assert go_on.wait(60), "only the event loop lets it go on"
        return write_there(*arguments)

    monkeypatch.setattr(os, "pwritev", slow)

    async def write() -> None:
        client = kvbank.connect_async(host.address)
        writing = asyncio.create_task(client.write("b", make_chunk(0), **host.digests))
        await asyncio.to_thread(staging.wait)
        closing = asyncio.create_task(client.close())
        for _ in range(10):
            await asyncio.sleep(0)
        go_on.set()
        await closing
        with suppress(kvbank.ClientClosed):
            await writing

    asyncio.run(write())
    assert not host.staged()


def test_closing_does_not_wait_in_the_loop_for_the_service_to_stop(address: str) -> None:
    stopping, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        stopping.set()
        assert go_on.wait(60), "only the event loop lets it go on"

    async def close() -> None:
        client = kvbank.AsyncClient(address, on_close=stop)
        closing = asyncio.create_task(client.close())
        while not stopping.is_set():
            await asyncio.sleep(0)
        assert not closing.done()
        go_on.set()
        await closing

    asyncio.run(close())
