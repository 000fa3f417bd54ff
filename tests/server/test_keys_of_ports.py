"""Ports other than gRPC's go by the same keys, and none is opened to others before there is a key."""

import http.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.domain.errors import StartError
from memory_service.domain.limits import Limits
from tests.support.certificates import Authority

QUICK = Limits(wrong_key_s=0.0)
# What HTTP answers without a key, and with one of each kind.
OPEN, CLOSED, FORBIDDEN = 200, 401, 403


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    with LocalServer(tmp_path / "data", metrics_listen="0.0.0.0:0", insecure=True, limits=QUICK) as made:
        yield made


def asker(server: LocalServer) -> Callable[..., tuple[int, Any]]:
    port = server.metrics_address.rpartition(":")[2]

    def ask(path: str, *headers: tuple[str, str]) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        connection.putrequest("GET", path)
        for header in headers:
            connection.putheader(*header)
        connection.endheaders()
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status, answer.headers

    return ask


def test_the_figures_are_an_operators_and_the_health_is_everyones(server: LocalServer) -> None:
    ask = asker(server)
    assert ask("/metrics")[0] == OPEN
    with kvbank.connect(server.address) as owner:
        operator = owner.access.create_key("operator").secret
    with kvbank.connect(server.address, api_key=operator) as client:
        others = [client.access.create_key(role).secret for role in ("read", "write", "admin")]
    status, headers = ask("/metrics")
    assert (status, headers["WWW-Authenticate"]) == (CLOSED, "Bearer")
    assert ask("/healthz")[0] == ask("/readyz")[0] == OPEN
    for name, form in (("Authorization", "Bearer {}"), ("API-Key", "{}"), ("authorization", "bearer {}")):
        assert ask("/metrics", (name, form.format(operator)))[0] == OPEN
        assert {ask("/metrics", (name, form.format(key)))[0] for key in others} == {FORBIDDEN}
        assert ask("/metrics", (name, form.format(operator[:-1])))[0] == CLOSED
    bearer = ("Authorization", f"Bearer {operator}")
    for wrong in ((bearer, bearer), (bearer, ("api-key", operator)), (("Authorization", "Bearer \xe9"),)):
        assert ask("/metrics", *wrong)[0] == CLOSED
    assert ask("/metrics", ("Cookie", operator), ("X-API-Key", operator))[0] == CLOSED


def test_the_figures_of_a_loopback_need_no_key(tmp_path: Path) -> None:
    with LocalServer(tmp_path / "data", metrics_listen="127.0.0.1:0", limits=QUICK) as server:
        with kvbank.connect(server.address) as owner:
            owner.access.create_key("operator")
        assert asker(server)("/metrics")[0] == OPEN


@pytest.mark.parametrize("open_port", ["listen", "metrics_listen"])
def test_an_open_port_needs_a_key_at_the_start(tmp_path: Path, open_port: str) -> None:
    data, authority = tmp_path / "data", Authority(tmp_path / "tls")
    settings: dict[str, Any] = {open_port: "0.0.0.0:0", **authority.settings()}
    with pytest.raises(StartError, match=rf"reached by others, and there is no key yet: .* --memory {data}"):
        LocalServer(data, **settings)
    LocalServer(data, insecure=True, **settings).stop()
    with kvbank.connect(data) as owner:
        owner.access.revoke_key(owner.access.create_key("operator").key.key_id)
    LocalServer(data, **settings).stop()  # closed to everyone, and so open to no stranger
