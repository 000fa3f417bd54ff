"""`kvbank mcp` behind the official client, on stdin and over HTTPS: what one program remembers all recall."""

import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from mcp import Client, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client

import kvbank
from kvbank._mcp import server, stores
from kvbank.serving.clients import Clients
from kvbank.serving.listening import Listening
from memory_service.api.embedded import LocalServer
from tests.support import command
from tests.support.certificates import Authority
from tests.support.waiting import wait_until

KVBANK = ["-c", "from kvbank.cli import main; main()", "mcp"]


def program(*words: object) -> Any:
    """Start `kvbank mcp` on stdin and stdout."""
    arguments = [*KVBANK, *map(str, words)]
    return stdio_client(StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ)))


async def answer(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    found: dict[str, Any] = result.structured_content
    return found


async def refusal(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.content
    return str(result.content[0].text)


def run(test: Callable[[], Awaitable[None]]) -> None:
    anyio.run(test)


def told(client: kvbank.Client) -> kvbank.Session:
    """Make a session with a turn whose worker has kept why the answer came."""
    name = f"bank-{uuid.uuid4().hex}"
    memory = kvbank.TextMemory(client, name)
    chunks = memory.add(["The sea is wide.", "Ships come and go."]).chunk_ids
    session = client.sessions.create(name=uuid.uuid4().hex, bank=name)
    lease = client.sessions.acquire(session.session_id, "test").lease
    assert lease is not None
    client.delete_chunks(name, chunks[1:])
    kept = tuple(kvbank.AnswerChunk(name, chunk, 0, 4, 0.5, (0,), (0.25,)) for chunk in chunks)
    steps = (kvbank.AnswerStep("answer", "How is the sea?", True, 0, 4),)
    trace = kvbank.AnswerTrace((0,), steps, kept, 0, (0.0,), (0.5,), (0.0,), 4)
    items = [kvbank.Item("user", "How is the sea?"), kvbank.Item("assistant", "Wide.")]
    turns = [kvbank.Turn(items, metadata=trace.metadata), kvbank.Turn()]
    client.sessions.append(session.session_id, turns, epoch=lease.epoch, follows=0)
    return session


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[kvbank.Client, str, str]]:
    """Serve a folder that asks for keys; give a client, the address, and a key that may write."""
    data = tmp_path_factory.mktemp("keyed")
    with LocalServer(data, listen="127.0.0.1:0", durability="os") as server:
        with kvbank.connect(server.address) as owner:
            admin = owner.access.create_key("admin").secret
        with kvbank.connect(server.address, api_key=admin) as client:
            yield client, server.address, client.access.create_key("write").secret


@contextmanager
def over_https(place: Path, address: str, bank: str) -> Iterator[tuple[str, ssl.SSLContext]]:
    """Serve where others can reach it, in a thread; give the URL, and what trusts it."""
    authority, ready = Authority(place / "tls"), threading.Event()
    files = {name: Path(path) for name, path in authority.settings().items()}
    clients, at = Clients(address), Listening("the test", "0.0.0.0:0", **files)
    at.check()
    with at.socket() as listening:
        served = server.HttpServer(server.made(clients.client, bank, None), at, ready.set)
        thread = threading.Thread(target=served.run, args=([listening],))
        thread.start()
        try:
            assert ready.wait(120)
            trusted = ssl.create_default_context(cadata=authority.pem.decode())
            yield f"https://localhost:{listening.getsockname()[1]}{server.PATH}", trusted
        finally:
            served.should_exit = True
            thread.join(120)
            clients.close()


@asynccontextmanager
async def caller(url: str, trusted: ssl.SSLContext, key: str) -> AsyncIterator[Client]:
    async with (
        httpx2.AsyncClient(verify=trusted, headers={"Authorization": f"Bearer {key}"}) as web,
        Client(streamable_http_client(url, http_client=web)) as client,
    ):
        yield client


def test_two_programs_share_one_memory(keyed: tuple[kvbank.Client, str, str], tmp_path: Path) -> None:
    """Start one on stdin, with a key of its own, and one over HTTPS, whose callers bring theirs."""
    client, address, key = keyed
    bank, session = f"bank-{uuid.uuid4().hex}", told(client)
    words = ("--memory", address, "--bank", bank, "--api-key", key)

    async def talk(url: str, trusted: ssl.SSLContext) -> None:
        async with httpx2.AsyncClient(verify=trusted) as web:
            without = await web.post(url, json={})
            assert (without.status_code, "needs a key" in without.text) == (401, True)
        async with caller(url, trusted, "kvb_nobody") as nobody:
            assert "needs a key that is valid" in await refusal(nobody, "recall", query="snow")
        async with Client(program(*words)) as one, caller(url, trusted, key) as other:
            tools = (await one.list_tools()).tools
            assert {tool.name for tool in tools if tool.annotations.destructive_hint} == {"forget"}
            reading = {tool.name for tool in tools if tool.annotations.read_only_hint}
            assert reading == {"recall", "list_sessions", "explain"}
            assert all(tool.description and tool.output_schema for tool in tools)
            await before_anything(one)
            await together(one, other)
            await explained(other)
            await refused(one)
            await answer(other, "forget", source="novel")
            assert [each["source"] for each in (await answer(one, "recall", query="snow"))["passages"]] == ["lexicon"]

    async def before_anything(one: Client) -> None:
        """Ask a bank that is not there yet: it has nothing to recall, to forget and to explain."""
        assert await answer(one, "recall", query="snow") == {"bank": bank, "passages": []}
        for chosen in ({"source": "novel"}, {"chunk_ids": [1]}):
            assert await answer(one, "forget", **chosen) == {"bank": bank, "forgotten": 0, "receipt": ""}
        for chunk in ({}, {"chunk_id": 1}):
            assert (await answer(one, "explain", query="snow", **chunk))["passages"] == []

    async def together(one: Client, other: Client) -> None:
        """Remember by both at once, and lose nothing."""
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                for name, each in (("novel", one), ("lexicon", other)):
                    text = f"Snow fell on the old mill {name} {number}."
                    tasks.start_soon(lambda e=each, t=text, n=name: answer(e, "remember", text=t, source=n))
        found = (await answer(one, "recall", query="snow", top_k=100, source=""))["passages"]
        assert len({each["text"] for each in found}) == 20
        again = await answer(other, "remember", text="Snow fell on the old mill novel 3.", source="novel")
        assert (again["written"], again["known"]) == (0, 1)
        some = [each["chunk_id"] for each in found if each["source"] == "lexicon"][1:]
        gone = await answer(one, "forget", chunk_ids=[*some, 10**9])
        assert (gone["forgotten"], bool(gone["receipt"])) == (len(some), True)
        assert await answer(one, "forget", chunk_ids=some) == {"bank": bank, "forgotten": 0, "receipt": ""}

    async def explained(other: Client) -> None:
        best = (await answer(other, "explain", query="what of mills in snow?"))["passages"][0]
        assert best["found_by"] == "lexical"
        assert next(iter(best["shared_words"])) == "snow"
        assert best["shared_words"]["mills"] > 0
        assert sum(best["shared_words"].values()) <= best["passage"]["score"] + 0.05
        assert best["age_seconds"] < 600
        number = best["passage"]["chunk_id"]
        one = (await answer(other, "explain", query="what of mills in snow?", chunk_id=number))["passages"]
        assert one[0]["passage"]["score"] == pytest.approx(best["passage"]["score"], abs=1e-4)
        why = (await answer(other, "explain", session=session.name))["answer"]
        assert (why["turn"], why["answer"]) == (1, "Wide.")
        assert [each["mass"] for each in why["trace"]["chunks"]] == [[0.25], [0.25]]
        assert [each["text"] for each in why["passages"]] == ["The sea is wide."]  # the other one is forgotten
        listed = (await answer(other, "list_sessions", limit=1000))["sessions"]
        assert [each["turns"] for each in listed if each["session_id"] == session.session_id] == [2]

    async def refused(one: Client) -> None:
        assert "give chunk_ids or source" in await refusal(one, "forget")
        assert "give query" in await refusal(one, "explain")
        assert "give query" in await refusal(one, "explain", query="snow", turn=1)
        assert "give query" in await refusal(one, "explain", session=session.name, chunk_id=1)
        assert "there is no session" in await refusal(one, "explain", session="nobody's")
        assert "no turn 3" in await refusal(one, "explain", session=session.name, turn=3)
        assert "nothing of turn 2" in await refusal(one, "explain", session=session.name, turn=2)
        assert "is empty" in await refusal(one, "remember", text=" \n")
        assert "top_k" in await refusal(one, "recall", query="snow", top_k=0)

    with over_https(tmp_path, address, bank) as served:
        run(lambda: talk(*served))


def test_a_folder_is_open_for_a_call_and_waited_for(tmp_path: Path) -> None:
    folder, said = tmp_path / "memory", "is in use by process .* serve it to all .*kvbank serve --data"
    store = stores.Folder(folder, patience=0.1)
    with store("") as client, store("") as same:
        assert client is same
        kvbank.TextMemory(client, "default").add("Snow fell.")
        with pytest.raises(kvbank.Unavailable, match=said), stores.Folder(folder, patience=0.1)(""):
            pass
        counted = list[int]()

        def count() -> None:
            with stores.Folder(folder)("") as other:
                counted.append(kvbank.TextMemory(other, "default").count())

        waiting = threading.Thread(target=count)
        waiting.start()
    waiting.join(60)
    assert counted == [1]


def test_calls_that_find_the_folder_taken_wait_together(tmp_path: Path) -> None:
    """Let calls at once end in about the time of one, and a later one find the folder free."""
    folder, patience, calls = tmp_path / "memory", 1.0, 8
    store, begin = stores.Folder(folder, patience), threading.Barrier(calls)

    def call(_: int) -> None:
        begin.wait()
        with pytest.raises(kvbank.Unavailable, match="is in use by process"), store(""):
            pass

    with kvbank.connect(folder), ThreadPoolExecutor(calls) as threads:
        began = time.monotonic()
        list(threads.map(call, range(calls)))
        assert time.monotonic() - began < patience * calls / 2
    with store("") as client:
        assert list(client.list_banks()) == []


def test_a_call_does_not_give_up_while_others_take_turns_at_the_folder(tmp_path: Path) -> None:
    """Let the folder be taken anew, as the time of its note says, before the patience of a call is over."""
    folder, patience = tmp_path / "memory", 0.5
    with ThreadPoolExecutor(1) as threads:
        with kvbank.connect(folder):
            waiting = threads.submit(lambda: stores.Folder(folder, patience)("").__enter__())
            for _ in range(30):
                os.utime(folder / "kvbank.lock")
                with pytest.raises(TimeoutError):
                    waiting.result(patience / 10)
        waiting.result(60).close()


@pytest.mark.slow
def test_programs_that_use_one_folder_at_once_lose_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "memory"

    async def talk() -> None:
        async with Client(program("--memory", folder)) as one, Client(program("--memory", folder)) as other:
            async with anyio.create_task_group() as tasks:
                for number in range(8):
                    for name, each in (("one", one), ("other", other)):
                        tasks.start_soon(lambda e=each, t=f"{name} {number}": answer(e, "remember", text=t))
            assert len((await answer(one, "recall", query="one other", top_k=100))["passages"]) == 16
            with kvbank.connect(folder):
                said = await refusal(one, "recall", query="one")
            assert "is in use by process" in said
            assert f"kvbank serve --data {folder}" in said

    run(talk)


@pytest.mark.slow
def test_a_key_in_the_environment_does_not_go_with_the_calls_of_others(
    keyed: tuple[kvbank.Client, str, str], tmp_path: Path
) -> None:
    _, address, key = keyed
    ready, environment = tmp_path / "ready", {**os.environ, "KVBANK_API_KEY": key}
    words = ["--memory", address, "--listen", "127.0.0.1:0", "--ready-file", str(ready)]

    async def talk(url: str) -> None:
        async with Client(streamable_http_client(url)) as nobody:
            assert "needs a key that is valid" in await refusal(nobody, "recall", query="snow")

    with subprocess.Popen([sys.executable, *KVBANK, *words], env=environment, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            wait_until(lambda: ready.exists() or process.poll() is not None, seconds=120)
            assert process.poll() is None, process.stderr.read()
            run(lambda: talk(f"http://{ready.read_text().strip()}/mcp"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert process.stderr.read() == b""
        finally:
            process.kill()


def test_what_would_open_a_store_to_others_is_refused(tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        ended = command.run(command.application(), "mcp", *words)
        assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1)
        return ended.stderr

    assert "give this server a certificate" in refused("--memory", "127.0.0.1:1", "--listen", "0.0.0.0:0")
    assert "is a folder, and a server of HTTP" in refused("--memory", tmp_path, "--listen", "127.0.0.1:0")
    assert "is a unix socket" in refused("--memory", "unix:/nobody", "--listen", "127.0.0.1:0")
    assert "--api-key is for stdin" in refused(
        "--memory", "127.0.0.1:1", "--listen", "127.0.0.1:0", "--api-key", "kvb_x"
    )
    assert "is not HOST:PORT" in refused("--memory", "127.0.0.1:1", "--listen", "x")
