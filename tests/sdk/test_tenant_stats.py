"""Figures are those of the caller's tenant, and those of the whole service for an operator."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvbank
from memory_service.api.embedded import LocalServer

EMBEDDING = kvbank.EmbeddingSpec("cd" * 32, 4)
Run = Callable[..., Any]


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start a service of two tenants, each with a bank "notes"; give its address, and the key of each caller."""
    with LocalServer(tmp_path / "data") as server:
        with kvbank.connect(server.address) as owner:
            found = {"operator": owner.access.create_key("operator").secret}
        with kvbank.connect(server.address, api_key=found["operator"]) as operator:
            for number, tenant in enumerate(("red", "blue"), 1):
                operator.access.create_tenant(tenant, quota=kvbank.TenantQuota(chunks=3 * number))
                found[tenant] = operator.access.create_key("write", tenant=tenant).secret
                with kvbank.connect(server.address, api_key=found[tenant]) as client:
                    client.create_bank("notes", kv=None, embedding=EMBEDDING, metadata={"of": tenant})
                    for _ in range(number):
                        chunk = kvbank.NewChunk(np.ones(4, np.float32), None, original_length=2)
                        client.write("notes", chunk, reader_digest="", embedder_digest=EMBEDDING.embedder_digest)
        yield found | {"address": server.address}


def test_a_tenant_sees_its_own_figures_and_an_operator_all(keys: dict[str, str]) -> None:
    found = {}
    for who in ("red", "blue", "operator"):
        with kvbank.connect(keys["address"], api_key=keys[who]) as client:
            found[who] = client.stats()
    for number, tenant in enumerate(("red", "blue"), 1):
        own = found[tenant]
        assert [(each.tenant, each.bank.metadata) for each in own.banks] == [(tenant, {"of": tenant})]
        assert [(each.name, each.usage.chunks, each.quota.chunks) for each in own.tenants] == [
            (tenant, number, 3 * number)
        ]
        assert own.samples == ()
        figures = own.resident_bytes, own.free_bytes, own.database_bytes, own.database_free_bytes, own.index_bytes
        assert figures == (0, 0, 0, 0, 0)
    every = found["operator"]
    assert [(each.tenant, each.bank.name, each.bank.metadata) for each in every.banks] == [
        ("blue", "notes", {}),
        ("red", "notes", {}),
    ]
    assert {each.name: each.usage.chunks for each in every.tenants} == {"default": 0, "red": 1, "blue": 2}
    assert every.database_bytes > 0
    assert every.samples


def test_stats_shows_a_tenant_its_own_and_an_operator_all(run: Run, keys: dict[str, str]) -> None:
    shown = {
        who: run("stats", "--memory", keys["address"], "--api-key", keys[who]).stdout for who in ("red", "operator")
    }
    assert "chunks 3" in shown["red"]
    for words in ("blue/notes", "on its disk", "database", "red/notes"):
        assert words not in shown["red"]
        assert words in shown["operator"]
    answer = json.loads(run("stats", "--memory", keys["address"], "--api-key", keys["red"], "--json").stdout)
    assert [each["name"] for each in answer["tenants"]] == ["red"]
