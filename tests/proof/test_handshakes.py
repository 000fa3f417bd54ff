"""Callers who speak no protocol cost a service nothing, and write nothing into its log but what is escaped."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import kvbank
from tests.proof.handshakes import ESCAPE, free_address, greet, unescaped
from tests.support.certificates import Authority

MIB = 1 << 20
CONNECTIONS = 150


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_broken_handshakes(host: Any, tmp_path: Path, tls: bool) -> None:
    metrics = free_address()
    flags: dict[str, Any] = {"listen": "127.0.0.1:0", "metrics_listen": metrics, "durability": "os"}
    authority = Authority(tmp_path / "authority")
    service = host.start(tmp_path / "data", **flags, **(authority.settings() if tls else {}))
    options = {"tls": True, "root_certificates": authority.pem} if tls else {}
    with ExitStack() as opened:
        client = opened.enter_context(kvbank.connect(service.address, **options))
        for address in (service.address, metrics):
            greet(address, CONNECTIONS // 3, seed=10**6)  # what is loaded at first use is loaded now
        before = service.resident_bytes()
        for address in (service.address, metrics):
            greet(address, CONNECTIONS, seed=1)
        assert client.server_info().store_id
        assert service.resident_bytes() - before < 50 * MIB
    assert service.stop() == 0
    assert unescaped(service.log()) == []
    assert ESCAPE not in service.log()
