"""Where callers are, and what they say of themselves, as gRPC and HTTP hand it on."""

import pytest

from memory_service.access import credentials, peers, secret
from memory_service.domain.errors import ServiceError


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("unix:", True),
        ("unix:/run/kvbank.sock", True),
        ("ipv4:127.0.0.1:4711", True),
        ("ipv4:127.200.0.9:4711", True),
        ("ipv6:%5B::1%5D:4711", True),
        ("ipv6:[::1]:4711", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:4711", True),
        ("ipv4:10.0.0.1:4711", False),
        ("ipv4:128.127.0.0:1", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:4711", False),
        ("ipv6:%5B::ffff:10.0.0.1%5D:4711", False),
        ("ipv4:localhost:4711", False),
        ("vsock:3:1", False),
        ("", False),
    ],
)
def test_only_a_socket_and_the_loopback_are_of_this_machine(peer: str, local: bool) -> None:
    assert peers.is_local(peer) is local


def test_a_host_is_an_address_or_a_network_of_its_own() -> None:
    assert peers.host("ipv4:10.0.0.1:1") == peers.host("ipv4:10.0.0.1:2") != peers.host("ipv4:10.0.0.2:1")
    assert peers.host("ipv6:%5B2001:db8::1%5D:1") == peers.host("ipv6:%5B2001:db8::ffff%5D:2")
    assert peers.host("ipv6:%5B2001:db8::1%5D:1") != peers.host("ipv6:%5B2001:db8:0:1::1%5D:1")
    assert peers.host("ipv6:%5B::ffff:10.0.0.1%5D:1") == peers.host("ipv4:10.0.0.1:1")


@pytest.mark.parametrize("name", ["authorization", "api-key"])
def test_a_credential_is_what_one_header_says(name: str) -> None:
    value = "Bearer  kvb " if name == "authorization" else " kvb "
    assert credentials.of([("x-request-id", "r"), (name, value)]) == "kvb"
    assert credentials.of([("x-request-id", "r"), ("authorization-bin", b"x")]) == ""


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "kvb")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Digest kvb")],
        [("authorization", b"Bearer kvb")],
        [("api-key", "")],
        [("api-key", "k" * 8193)],
        [("api-key", "kvb"), ("api-key", "kvb")],
        [("api-key", "kvb"), ("authorization", "Bearer kvb")],
    ],
)
def test_what_is_not_one_credential_is_refused(metadata: list[tuple[str, str | bytes]]) -> None:
    with pytest.raises(ServiceError) as caught:
        credentials.of(metadata)
    assert caught.value.reason == "UNAUTHENTICATED"


def test_a_key_is_read_as_it_was_made_and_in_no_other_form() -> None:
    key_id, text = secret.new()
    found = secret.read(text)
    assert found is not None
    assert (found.key_id, len(found.sha256)) == (key_id, 32)
    assert secret.new() != (key_id, text)
    others = (text[:-1], f"{text}a", f"{text}\n", f" {text}", text.replace("_", "-"), text[:-1] + "é", text[:-1] + "٣")
    for other in (*others, text.upper(), text[4:], "", "kvb_", "kvb__"):
        assert secret.read(other) is None, other
