"""The key of a client goes with each of its calls, and is nowhere else."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import kvbank
from kvbank.v1 import service_pb2, service_pb2_grpc

KEY = "kvb_abcdefgh_" + "s" * 32


class Noting(service_pb2_grpc.MemoryServiceServicer):
    """A server of another maker, which notes what metadata its callers send."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, str | bytes]] = []

    def GetServerInfo(self, _: Any, context: Any) -> service_pb2.GetServerInfoResponse:  # noqa: N802
        self.metadata.append(dict(context.invocation_metadata()))
        return service_pb2.GetServerInfoResponse(version="other")


@pytest.fixture
def noting() -> Iterator[tuple[str, Noting]]:
    server, service = grpc.server(ThreadPoolExecutor(1)), Noting()
    service_pb2_grpc.add_MemoryServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", service
    server.stop(None)


def sent(noting: tuple[str, Noting], **options: Any) -> str | bytes | None:
    address, service = noting
    with kvbank.connect(address, **options) as client:
        client.server_info()
    return service.metadata[-1].get("authorization")


def test_a_key_goes_with_the_calls_of_both_clients(noting: tuple[str, Noting]) -> None:
    assert sent(noting, api_key=KEY) == f"Bearer {KEY}"

    async def call() -> None:
        async with kvbank.connect_async(noting[0], api_key=KEY) as client:
            await client.server_info()

    asyncio.run(call())
    assert noting[1].metadata[-1]["authorization"] == f"Bearer {KEY}"


def test_a_key_comes_out_of_a_file_or_the_environment(
    noting: tuple[str, Noting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert sent(noting) is None
    assert sent(noting, api_key=f"@{file}") == f"Bearer {KEY}"
    monkeypatch.setenv("KVBANK_API_KEY", f"@{file}")
    assert sent(noting) == f"Bearer {KEY}"
    assert sent(noting, api_key="other") == "Bearer other"
    monkeypatch.setenv("KVBANK_API_KEY", "")
    assert sent(noting) is None


def test_a_folder_takes_no_key_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBANK_API_KEY", "not a key")
    with kvbank.connect(tmp_path / "memory") as client:
        assert client.server_info().store_id


@pytest.mark.parametrize(
    "key",
    ["", " ", "secret words", "secret\n", "sécret", "s" * 4097, "secret\0", 5, b"secret", "@", "@/no/such/secret"],
)
def test_what_is_no_key_is_refused_without_being_shown(key: Any) -> None:
    with pytest.raises(kvbank.InvalidArgument) as caught:
        kvbank.connect("127.0.0.1:1", api_key=key)
    assert caught.value.metadata == {"field": "api_key"}
    if not str(key).startswith("@"):
        assert "ecret" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"secret words", b"\xff\xfe", b"s" * 10_000])
def test_a_file_without_a_key_is_refused_without_being_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(kvbank.InvalidArgument) as caught:
        kvbank.connect("127.0.0.1:1", api_key=f"@{tmp_path / 'key'}")
    assert "secret" not in str(caught.value)
    with pytest.raises(kvbank.InvalidArgument, match="cannot read"):
        kvbank.connect("127.0.0.1:1", api_key=f"@{tmp_path}")


@pytest.mark.parametrize("key", [f"kvb_3HoDP0DI_{'secret' * 6}", "eyJ" + "secret" * 100])
def test_a_key_in_the_place_of_the_name_of_a_file_is_not_shown(key: str) -> None:
    with pytest.raises(kvbank.InvalidArgument, match="@FILE stands for the key in a file") as caught:
        kvbank.connect("127.0.0.1:1", api_key=f"@{key}")
    assert "secret" not in str(caught.value)


def test_the_name_of_a_file_in_the_place_of_a_key_is_told(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    with pytest.raises(kvbank.InvalidArgument, match="@FILE stands for the key in it"):
        kvbank.connect("127.0.0.1:1", api_key=str(tmp_path / "key"))
    (tmp_path / "key").write_text("\n")
    with pytest.raises(kvbank.InvalidArgument, match=f"there is no key in '{tmp_path / 'key'}'"):
        kvbank.connect("127.0.0.1:1", api_key=f"@{tmp_path / 'key'}")


def test_a_key_is_in_no_text_of_a_client() -> None:
    with kvbank.connect("127.0.0.1:1", api_key=KEY, first_contact=0.1) as client:
        with pytest.raises(kvbank.Unavailable) as caught:
            client.server_info()
        assert "ssss" not in f"{caught.value} {caught.value!r} {client!r} {vars(client)!r}"


@pytest.mark.parametrize(
    "address",
    [
        *("host:7400", "10.0.0.1:7400", "[fe80::1]:7400", "dns:host:7400", "127.0.0.1:1,b:2", "b:2,localhost:1"),
        # What looks like the loopback, and is not.
        *("localhost.example.org:1", "127.0.0.1.example.org:1", "0.0.0.0:1", "[::]:1", "[::ffff:10.0.0.1]:1"),
        *("ipv4:10.0.0.1:1", "dns:///10.0.0.1:1", "127.1:1", "2130706433:1"),
    ],
)
def test_a_key_goes_to_other_machines_over_tls_alone_unless_the_caller_says_so(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(kvbank.InvalidArgument, match=r"would go to .* as plain text: speak TLS") as caught:
        kvbank.connect(address, api_key=KEY)
    assert caught.value.metadata == {"field": "api_key"}
    assert "ssss" not in str(caught.value)
    for name in ("authorization", "api-key"):
        with pytest.raises(kvbank.InvalidArgument, match=r"would go to .* as plain text: speak TLS") as caught:
            kvbank.connect(address, metadata={name: KEY})
        assert caught.value.metadata == {"field": "metadata"}
    kvbank.connect(address, metadata={"a": "b"}).close()
    kvbank.connect(address, metadata={"api-key": KEY}, tls=False).close()
    kvbank.connect(address).close()
    kvbank.connect(address, api_key=KEY, tls=False).close()
    kvbank.connect(address, api_key=KEY, tls=True).close()
    monkeypatch.setenv("KVBANK_API_KEY", KEY)
    with pytest.raises(kvbank.InvalidArgument, match="as plain text"):
        kvbank.connect(address)
    for switch in ("0", "1"):
        monkeypatch.setenv("KVBANK_TLS", switch)
        kvbank.connect(address).close()


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1", "ipv4:127.0.0.1:1", "dns:///localhost:1", "unix:/s"],
)
def test_a_key_stays_on_this_machine_without_tls(address: str) -> None:
    kvbank.connect(address, api_key=KEY).close()
