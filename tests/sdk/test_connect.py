"""The forms of a target, folders, closed and forked clients."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

import kvbank
from kvbank import _connect
from tests.sdk.relay import Relay


@pytest.mark.parametrize("target", ["host:7400", "127.0.0.1:1", "[::1]:7400", "unix:/run/kvbank.sock", "dns:///m:1"])
def test_addresses(target: str) -> None:
    assert kvbank.parse_target(target) == target


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("existing").mkdir()
    for target in ("./memory", "a/b", "existing", ".", Path("memory")):
        assert isinstance(kvbank.parse_target(target), Path)
    assert kvbank.parse_target("~/memory") == Path.home() / "memory"


@pytest.mark.parametrize(
    "target", ["", " ", "host", "memory", "host:0", "host:65536", "host:port", ":7400", "http://host:7400", "unix:"]
)
def test_odd_targets_are_refused_with_what_is_expected(target: str) -> None:
    for connect in (kvbank.connect, kvbank.connect_async):
        with pytest.raises(kvbank.InvalidArgument, match="expected host:port, unix:PATH or a folder"):
            connect(target)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(kvbank.InvalidArgument, match="is a file"):
        kvbank.connect(tmp_path / "file")


def test_a_folder_is_a_memory_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedding: kvbank.EmbeddingSpec
) -> None:
    monkeypatch.chdir(tmp_path)
    with kvbank.connect("./folder") as client:
        store_id = client.server_info().store_id
        client.create_bank("notes", kv=None, embedding=embedding)

    async def names() -> list[str]:
        async with kvbank.connect_async("./folder") as client:
            assert (await client.server_info()).store_id == store_id
            return [bank.name async for bank in client.list_banks()]

    assert asyncio.run(names()) == ["notes"]


@pytest.mark.parametrize("parent", ["short", "long-" * 20])
def test_a_folder_is_served_to_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: str) -> None:
    """Also where the folder for temporary files has a longer name than a socket may have."""
    (tmp_path / parent).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / parent))
    address, stop = _connect._open(tmp_path / "folder")
    socket_path = Path(address.removeprefix("unix:"))
    assert socket_path.is_socket()
    assert socket_path.parent.stat().st_mode & 0o777 == 0o700
    assert stop is not None
    stop()
    assert not socket_path.parent.exists()
    assert not list((tmp_path / parent).iterdir())


def test_where_no_socket_can_be_made_a_folder_is_served_on_the_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    address, stop = _connect._open(tmp_path)
    assert address.startswith("127.0.0.1:")
    assert stop is not None
    stop()


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    with kvbank.connect(tmp_path), pytest.raises(kvbank.Unavailable, match="in use by"):
        kvbank.connect(tmp_path)


def test_a_bad_setting_of_the_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBANK_MIN_FREE", "much")
    with pytest.raises(kvbank.InvalidArgument, match="KVBANK_MIN_FREE"):
        kvbank.connect(tmp_path)


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules["sqlalchemy"] = None
import kvbank
try:
    kvbank.connect({str(tmp_path / "folder")!r})
except kvbank.MissingExtra as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.count("\n") == 1
    assert "pip install 'kvbank[server]'" in run.stdout


def test_a_closed_client_says_so(address: str) -> None:
    client = kvbank.connect(address)
    client.server_info()
    client.close()
    client.close()
    for call in (
        client.server_info,
        lambda: list(client.list_banks()),
        lambda: client.fetch("b", [1], reader_digest=""),
    ):
        with pytest.raises(kvbank.ClientClosed):
            call()


def test_a_close_at_the_moment_a_call_starts(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close between the check and the call, as another thread may; gRPC's own word for it is ValueError."""
    chunk = kvbank.NewChunk([1.0])
    calls: list[Callable[[kvbank.Client], object]] = [
        lambda client: client.server_info(),
        lambda client: client.fetch("b", [1], reader_digest=""),
        lambda client: client.write("b", chunk, reader_digest="", embedder_digest=""),
    ]
    for call in calls:
        client = kvbank.connect(address)
        client.server_info()
        monkeypatch.setattr(client._caller, "bound", 1)
        monkeypatch.setattr(client._caller, "_check", client.close)
        with pytest.raises(kvbank.ClientClosed):
            call(client)


def test_a_close_during_an_async_call(address: str) -> None:
    calls: dict[str, Callable[[kvbank.AsyncClient], Coroutine[Any, Any, object]]] = {
        "GetBank": lambda client: client.get_bank("b"),
        "FetchChunks": lambda client: client.fetch("b", [1], reader_digest=""),
        "WriteChunks": lambda client: client.write("b", kvbank.NewChunk([1.0]), reader_digest="", embedder_digest=""),
    }

    async def use(relay: Relay, method: str) -> None:
        client = kvbank.connect_async(relay.address)
        task = asyncio.create_task(calls[method](client))
        while method not in relay.calls:
            await asyncio.sleep(0)
        await client.close()
        with pytest.raises(kvbank.ClientClosed):
            await task

    for method in calls:
        with closing(Relay(address)) as relay:
            relay.silence(method)
            asyncio.run(use(relay, method))


def test_a_closed_async_client_says_so(address: str) -> None:
    async def use() -> None:
        async with kvbank.connect_async(address) as client:
            await client.server_info()
        with pytest.raises(kvbank.ClientClosed):
            await client.server_info()

    asyncio.run(use())


@pytest.mark.parametrize("turns", range(1, 8))
def test_a_close_that_is_cancelled_stops_the_service_too(address: str, turns: int) -> None:
    """Cancel the close after so many turns of the event loop, after a write, for which there is a second channel."""
    stopped: list[int] = []

    async def use() -> None:
        client = kvbank.AsyncClient(address, on_close=lambda: stopped.append(turns))
        with pytest.raises(kvbank.BankNotFound):
            await client.write("none", kvbank.NewChunk([1.0]), reader_digest="", embedder_digest="")
        closing = asyncio.create_task(client.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        with suppress(asyncio.CancelledError):
            await closing
        assert stopped == [turns]

    asyncio.run(use())


def test_an_async_client_belongs_to_one_event_loop(tmp_path: Path) -> None:
    """Refuse every call in another loop; `close` works there, and gives the folder back."""
    client = kvbank.connect_async(tmp_path / "memory")
    asyncio.run(client.server_info())
    chunk = kvbank.NewChunk([1.0])
    for call in (
        client.server_info,
        lambda: anext(client.list_banks()),
        lambda: client.fetch("b", [1], reader_digest=""),
        lambda: client.write("b", chunk, reader_digest="", embedder_digest=""),
    ):

        async def use(call: Callable[[], Any] = call) -> None:
            await call()

        with pytest.raises(kvbank.LoopMismatch):
            asyncio.run(use())
    asyncio.run(client.close())
    kvbank.connect(tmp_path / "memory").close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_client_does_not_cross_a_fork(address: str) -> None:
    script = f"""
import os, kvbank
client = kvbank.connect({address!r})
client.server_info()
child = os.fork()
if child == 0:
    try:
        client.server_info()
    except kvbank.ClientForked:
        client.close()
        os._exit(7)
    os._exit(1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7
client.server_info()
client.close()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_nobody_listens(unused_port: int) -> None:
    with (
        kvbank.connect(f"127.0.0.1:{unused_port}", first_contact=0.3) as client,
        pytest.raises(kvbank.Unavailable) as caught,
    ):
        client.server_info()
    assert caught.value.retryable
    assert caught.value.reason == ""


def test_a_deadline_can_be_set_for_a_call(silent: socket.socket) -> None:
    """Ask a listener that never answers: without the deadline the call would wait for the client's 30 s."""
    with kvbank.connect(f"127.0.0.1:{silent.getsockname()[1]}") as client, pytest.raises(kvbank.DeadlineExceeded):
        client.server_info(timeout=0.2)


def test_a_cancelled_task_leaves_nothing_behind(silent: socket.socket) -> None:
    async def use() -> None:
        async with kvbank.connect_async(f"127.0.0.1:{silent.getsockname()[1]}") as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.retrieve("bank", [1.0]), 0.1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(
                    client.write("bank", kvbank.NewChunk([1.0]), reader_digest="", embedder_digest=""), 0.1
                )

    asyncio.run(use())
