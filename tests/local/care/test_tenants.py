"""Care keeps the banks of several tenants apart, also those of one name, and keeps their tenants and keys."""

import shutil
from dataclasses import replace

import pytest

from memory_service.domain.access import ApiKey
from memory_service.domain.tenants import TenantQuota
from tests.local.care.folders import answer, clean, execute, file_of, flip, refusal
from tests.support.engines import opened
from tests.support.store import held, new_chunk
from tests.support.writing import PAYLOAD, admitted, begun, made_bank, writer

QUOTA = TenantQuota(chunks=9)


@pytest.fixture
def tenants(data):
    """Make a folder in which the default tenant and two more have a bank "b" of three chunks each; give their ids."""
    ids = {}
    with opened(data) as engine:
        for number, tenant in enumerate(("default", "red", "blue")):
            if tenant != "default":
                engine.access.add_tenant(tenant, QUOTA)
            bank, writes = made_bank(engine, tenant=tenant), writer(engine)
            chunks = [replace(new_chunk(3 * number + i), payload=PAYLOAD) for i in range(3)]
            ids[tenant] = [begun(writes, admitted(writes, bank, each)).result(60).chunk_id for each in chunks]
        engine.access.add_key(ApiKey("k1", "red", "write", b"\x01" * 32))
    return ids


def ids_now(data):
    """Return the ids of the chunks of each tenant's bank."""
    with opened(data) as engine:
        return {bank.tenant: held(engine.store, bank) for bank in engine.store.known_banks()}


def test_what_is_damaged_of_one_tenant_is_not_taken_from_another(tenants, data):
    clean(data)
    damaged, missing = tenants["red"][1], tenants["blue"][0]
    flip(file_of(data, damaged))
    file_of(data, missing).unlink()
    found = answer("check", data, code=1)["problems"]
    assert {(each["kind"], each["bank"], each["chunk_id"]) for each in found} == {
        ("payload_damaged", "red/b", damaged),
        ("payload_missing", "blue/b", missing),
    }
    answer("repair", data)
    clean(data)
    left = {tenant: [i for i in ids if i not in (damaged, missing)] for tenant, ids in tenants.items()}
    assert ids_now(data) == left


def test_a_bank_whose_disk_is_missing_is_named_with_its_tenant(tenants, data):
    shutil.rmtree(file_of(data, tenants["red"][0]).parents[1])
    text = refusal("repair", data)
    assert "the payloads of bank red/b are not there" in text
    assert "use with a key of the tenant red: kvbank bank rm b\n" in text


def test_a_tenant_without_a_record_gets_one_and_a_key_of_no_tenant_is_revoked(tenants, data):
    """See to it that the key stays: a service asks for keys as long as its store has any."""
    execute(data, "DELETE FROM tenants WHERE name IN ('default', 'blue')")
    execute(data, "UPDATE api_keys SET tenant = 'nobody'")
    found = answer("check", data, code=1)["problems"]
    assert sorted(each["kind"] for each in found) == ["orphan_row", "tenant", "tenant"]
    answer("repair", data)
    clean(data)
    assert ids_now(data) == tenants
    with opened(data) as engine:
        quotas = {tenant.name: tenant.quota for tenant in engine.access.tenants()}
        assert quotas == {"default": TenantQuota(), "red": QUOTA, "blue": TenantQuota()}
        (key,) = engine.access.keys_of()
        assert (key.tenant, key.valid(engine.store.clock.now_us())) == ("default", False)


def test_a_quota_that_cannot_be_read_is_found_and_becomes_none(tenants, data):
    execute(data, "UPDATE tenants SET quota = '{' WHERE name = 'blue'")
    (found,) = answer("check", data, code=1)["problems"]
    assert (found["kind"], found["detail"]) == ("tenant", "the quota of the tenant blue cannot be read")
    answer("repair", data)
    clean(data)
    with opened(data) as engine:
        quotas = {tenant.name: tenant.quota for tenant in engine.access.tenants()}
        assert quotas == {"default": TenantQuota(), "red": QUOTA, "blue": TenantQuota()}


def test_a_backup_brings_tenants_keys_and_the_banks_of_all(tenants, data, tmp_path):
    answer("backup", data, tmp_path / "backup")
    answer("restore", tmp_path / "backup", tmp_path / "restored")
    with opened(data) as engine:
        kept = engine.access.tenants(), engine.access.keys_of()
    with opened(tmp_path / "restored") as engine:
        assert (engine.access.tenants(), engine.access.keys_of()) == kept
        assert engine.access.tenant_usage("red").chunks == 3
    assert ids_now(tmp_path / "restored") == tenants
