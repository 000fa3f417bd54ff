"""The protocol `AccessRecords`, called directly: tenants, their banks and their keys."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest

from memory_service.domain.access import EVERY_BANK, ApiKey
from memory_service.domain.errors import QuotaError
from memory_service.domain.limits import Limits
from memory_service.domain.model import Capacity
from memory_service.domain.tenants import DEFAULT_TENANT, TenantQuota, TenantUsage
from memory_service.storage.base import Engine
from tests.support.clocks import HOUR, SECOND, Hands
from tests.support.store import CHUNK_BYTES, add, fill, held, new_bank, reason
from tests.support.waiting import wait_until

Open = Callable[..., AbstractContextManager[Engine]]
QUOTA = TenantQuota(banks=2, chunks=3, tokens=0, bytes=10_000)
KEY = ApiKey("k1", "red", "write", b"\x01" * 32, ("notes", "chat-*"), created=5, expires=HOUR)


def test_tenants_are_made_once_and_change_their_quota(open_engine: Open) -> None:
    with open_engine() as engine:
        access = engine.access
        assert [tenant.name for tenant in access.tenants()] == [DEFAULT_TENANT]
        made = access.add_tenant("red", QUOTA)
        assert (made.name, made.quota) == ("red", QUOTA)
        assert made.created > 0
        assert reason(lambda: access.add_tenant("red", TenantQuota())) == "TENANT_EXISTS"
        assert access.tenant("red") == made
    with open_engine() as engine:
        access = engine.access
        assert [tenant.name for tenant in access.tenants()] == [DEFAULT_TENANT, "red"]
        assert access.tenant("red") == made
        assert access.set_tenant_quota("red", TenantQuota(tokens=7)) == replace(made, quota=TenantQuota(tokens=7))
        assert access.tenant("red").quota == TenantQuota(tokens=7)
        for call in (
            lambda: access.tenant("blue"),
            lambda: access.set_tenant_quota("blue", QUOTA),
            lambda: access.drop_tenant("blue"),
            lambda: access.add_key(replace(KEY, tenant="blue")),
            lambda: engine.store.create_bank(new_bank(tenant="blue")),
        ):
            assert reason(call) == "TENANT_NOT_FOUND"
        assert [tenant.name for tenant in access.tenants()] == [DEFAULT_TENANT, "red"]


def test_a_name_is_one_bank_for_each_tenant(open_engine: Open) -> None:
    with open_engine() as engine:
        store = engine.store
        engine.access.add_tenant("red", TenantQuota())
        mine, _ = store.create_bank(new_bank())
        theirs, new = store.create_bank(new_bank(tenant="red", capacity=Capacity("chunks", 2)))
        assert new
        assert theirs.uid != mine.uid
        ids = fill(store, mine, range(3)), fill(store, theirs, range(5))
        assert store.bank(DEFAULT_TENANT, "b").uid == mine.uid
        assert store.bank("red", "b").uid == theirs.uid
        assert (held(store, mine), held(store, theirs)) == (ids[0], ids[1][3:])
        only, _ = store.create_bank(new_bank("only", tenant="red"))
        for call in (
            lambda: store.bank(DEFAULT_TENANT, "only"),
            lambda: store.update_bank(DEFAULT_TENANT, "only", {"metadata": {"a": "b"}}),
            lambda: store.delete_bank(DEFAULT_TENANT, "only"),
            lambda: store.bank("nobody", "b"),
        ):
            assert reason(call) == "BANK_NOT_FOUND"
        with store.read() as view:
            assert [bank.uid for bank in view.banks(DEFAULT_TENANT)] == [mine.uid]
            assert [bank.uid for bank in view.banks("red")] == [theirs.uid, only.uid]
            assert [bank.uid for bank in view.banks("red", "b")] == [only.uid]
            assert list(view.banks("nobody")) == []
            assert [bank.uid for bank in view.banks_of_all()] == [mine.uid, theirs.uid, only.uid]
            assert [bank.uid for bank in view.banks_of_all("red", "b")] == [only.uid]
            assert [bank.uid for bank in view.banks_of_all("default", "b")] == [theirs.uid, only.uid]
        assert {bank.uid for bank in store.known_banks()} == {mine.uid, theirs.uid, only.uid}
        assert engine.access.tenant_usage("red") == TenantUsage(banks=2, chunks=2, tokens=4, bytes=2 * CHUNK_BYTES)
        assert engine.access.tenant_usage("nobody") == TenantUsage()
        store.delete_bank("red", "b")
        assert held(store, mine) == ids[0]
        assert store.bank(DEFAULT_TENANT, "b").uid == mine.uid
    with open_engine() as engine:
        assert engine.store.bank(DEFAULT_TENANT, "b").uid == mine.uid
        assert engine.store.bank("red", "only").uid == only.uid
        assert reason(lambda: engine.store.bank("red", "b")) == "BANK_NOT_FOUND"


def test_a_tenant_goes_with_its_keys_and_by_force_with_its_banks(open_engine: Open) -> None:
    with open_engine() as engine:
        access, store = engine.access, engine.store
        access.add_tenant("red", TenantQuota())
        mine, _ = store.create_bank(new_bank())
        theirs, _ = store.create_bank(new_bank(tenant="red"))
        add(store, mine, 1), add(store, theirs, 1)
        access.add_key(KEY), access.add_key(replace(KEY, key_id="k2", tenant=DEFAULT_TENANT))
        assert reason(lambda: access.drop_tenant("red")) == "TENANT_NOT_EMPTY"
        assert reason(lambda: access.drop_tenant(DEFAULT_TENANT, force=True)) == "TENANT_NOT_EMPTY"
        assert access.key("k1") == KEY
        assert access.drop_tenant("red", force=True) == 1
        assert reason(lambda: store.bank("red", "b")) == "BANK_NOT_FOUND"
        assert reason(lambda: add(store, theirs, 2)) == "BANK_NOT_FOUND"
        assert [key.key_id for key in access.keys_of()] == ["k2"]
        assert len(held(store, mine)) == 1
        access.add_tenant("red", TenantQuota())
        assert store.create_bank(new_bank(tenant="red"))[1]
        store.delete_bank("red", "b")
        assert access.drop_tenant("red") == 0
    with open_engine() as engine:
        assert [tenant.name for tenant in engine.access.tenants()] == [DEFAULT_TENANT]
        assert [bank.uid for bank in engine.store.known_banks()] == [mine.uid]


def test_a_store_that_had_keys_has_one_also_when_their_tenant_goes(open_engine: Open) -> None:
    """See to it that a service goes on to ask for keys, which it does as long as its store has any."""
    with open_engine() as engine:
        access = engine.access
        access.add_tenant("red", TenantQuota()), access.add_tenant("blue", TenantQuota())
        newest = replace(KEY, key_id="k0", created=9)
        access.add_key(newest), access.add_key(KEY), access.add_key(replace(KEY, key_id="k2", tenant="blue"))
        access.drop_tenant("blue")
        assert access.keys_of() == [KEY, newest]
        access.drop_tenant("red")
        (left,) = access.keys_of()
        assert left == replace(newest, tenant=DEFAULT_TENANT, banks=EVERY_BANK, revoked=left.revoked)
        assert not left.valid(engine.store.clock.now_us())
    with open_engine() as engine:
        assert engine.access.has_keys()


def test_keys_are_kept_with_all_that_they_say(open_engine: Open) -> None:
    with open_engine() as engine:
        access = engine.access
        access.add_tenant("red", TenantQuota())
        assert not access.has_keys()
        assert access.add_key(KEY)
        assert not access.add_key(replace(KEY, role="admin"))
        other = ApiKey("k0", DEFAULT_TENANT, "read", b"\x02" * 32, created=9)
        assert access.add_key(other)
        access.used_key("k1", 70), access.used_key("k1", 60), access.used_key("unknown", 80)
        assert access.key("k1") == replace(KEY, last_used=70)
        assert access.key("unknown") is None
        assert access.revoke_key("unknown", 5) is None
        assert access.revoke_key("k0", 50) == replace(other, revoked=50)
        revoked = replace(other, revoked=40)
        assert access.revoke_key("k0", 40) == access.revoke_key("k0", 60) == revoked
        assert "\\x01" not in repr(KEY)
    with open_engine() as engine:
        access = engine.access
        assert access.has_keys()
        assert access.keys_of() == [replace(KEY, last_used=70), revoked]
        assert access.keys_of("red") == [replace(KEY, last_used=70)]
        assert access.keys_of("nobody") == []


def test_keys_are_read_a_part_at_a_time(open_engine: Open) -> None:
    with open_engine() as engine:
        access = engine.access
        access.add_tenant("red", TenantQuota())
        # Two of each moment, so that the id says which comes first.
        made = [replace(KEY, key_id=f"k{number}", created=number // 2) for number in range(7)]
        for key in reversed(made):
            access.add_key(key)
        between = replace(KEY, key_id="k2x", tenant=DEFAULT_TENANT, created=1)
        access.add_key(between)
        assert access.keys_of("red", most=3) == made[:3]
        assert access.keys_of("red", after=made[2].place, most=3) == made[3:6]
        assert access.keys_of("red", after=made[5].place, most=3) == made[6:]
        assert access.keys_of("red", after=made[6].place) == []
        assert access.keys_of(most=4) == [*made[:3], between]
        assert access.keys_of(after=between.place, most=1) == [made[3]]
        assert access.keys_of("red", after=between.place, most=1) == [made[3]]


def test_a_tenant_has_so_many_keys_that_are_taken(open_engine: Open) -> None:
    """Keys that have ended are none of them, and neither are those of another tenant."""
    hands = Hands()
    with open_engine(clock=hands.clock()) as engine:
        access, now = engine.access, hands.wall
        access.add_tenant("red", TenantQuota())

        def key(name: str, **changes: Any) -> ApiKey:
            return replace(KEY, key_id=name, **{"expires": None, **changes})

        assert access.add_key(key("ends", expires=now + SECOND), most=3)
        assert access.add_key(key("has ended", expires=now), most=3)
        assert access.add_key(key("will be revoked", revoked=now + SECOND), most=3)
        assert access.add_key(key("stays"), most=3)
        assert refused(lambda: access.add_key(key("more"), most=3)) == ("tenant:red", "keys", 3, 3, 1)
        assert not access.add_key(key("stays"), most=4)
        assert access.add_key(key("others", tenant=DEFAULT_TENANT), most=3)
        hands.go_on(SECOND)
        assert access.add_key(key("more"), most=3)
        assert access.add_key(key("and more"), most=3)
        assert refused(lambda: access.add_key(key("too many"), most=3)) == ("tenant:red", "keys", 3, 3, 1)
        access.revoke_key("stays", hands.wall)
        assert access.add_key(key("instead"), most=3)


def test_keys_that_ended_long_ago_go_and_the_newest_of_all_stays(open_engine: Open) -> None:
    hands, limits = Hands(), Limits(keys_tidied_s=0.01, ended_key_s=3600.0, step_rows=2)
    with open_engine(clock=hands.clock(), limits=limits) as engine:
        access, now = engine.access, hands.wall
        access.add_tenant("red", TenantQuota())
        ends = {"expires": now + SECOND, "revoked": None}
        for name, changes in {
            **{f"expires {number}": ends for number in range(5)},
            "was revoked": {"expires": None, "revoked": now + SECOND},
            "revoked before its end": {"expires": now + HOUR, "revoked": now + SECOND},
            "expired before it was revoked": {"expires": now + SECOND, "revoked": now + HOUR},
            "ends later": {"expires": now + 2 * SECOND, "revoked": None},
            "stays": {"expires": None, "revoked": None},
        }.items():
            access.add_key(replace(KEY, key_id=name, created=now, **changes))
        newest = replace(KEY, key_id="the newest", tenant=DEFAULT_TENANT, created=now + 1, expires=now + SECOND)
        access.add_key(newest)
        hands.go_on(SECOND + HOUR - 1)
        wait_until(lambda: tidied(engine))
        assert len(access.keys_of()) == 11
        hands.go_on(1)
        wait_until(lambda: len(access.keys_of()) <= 3)
        assert [key.key_id for key in access.keys_of()] == ["ends later", "stays", "the newest"]
        assert access.has_keys()


def tidied(engine: Engine) -> bool:
    """See to it that the engine has looked at its keys once more: of two that have ended since 1970 one goes."""
    engine.access.add_key(ApiKey("old", "red", "read", b"", created=1, expires=2))
    wait_until(lambda: engine.access.key("old") is None)
    return True


def test_of_keys_that_have_ended_a_tenant_keeps_so_many(open_engine: Open) -> None:
    hands, limits = Hands(), Limits(keys_tidied_s=0.01, ended_keys=2)
    with open_engine(clock=hands.clock(), limits=limits) as engine:
        access, now = engine.access, hands.wall
        access.add_tenant("red", TenantQuota())
        for number in (3, 1, 4, 2):
            access.add_key(replace(KEY, key_id=f"k{number}", created=now, expires=now - 10 + number))
            access.add_key(replace(KEY, key_id=f"d{number}", tenant=DEFAULT_TENANT, created=now, expires=None))
        wait_until(lambda: len(access.keys_of("red")) == 2)
        assert [key.key_id for key in access.keys_of("red")] == ["k3", "k4"]
        assert len(access.keys_of(DEFAULT_TENANT)) == 4


def test_all_banks_of_a_tenant_together_stay_within_its_quota(open_engine: Open) -> None:
    """Refusals store and evict nothing, and what goes makes room again."""
    quota = TenantQuota(banks=2, chunks=4, tokens=0, bytes=3 * CHUNK_BYTES + 300)
    with open_engine() as engine:
        access, store = engine.access, engine.store
        access.add_tenant("red", quota)
        first, _ = store.create_bank(new_bank("first", tenant="red"))
        second, _ = store.create_bank(new_bank("second", tenant="red", capacity=Capacity("chunks", 2)))
        assert refused(lambda: store.create_bank(new_bank("third", tenant="red"))) == ("tenant:red", "banks", 2, 2, 1)
        assert store.create_bank(new_bank("first", tenant="red")) == (store.bank("red", "first"), False)
        mine, _ = store.create_bank(new_bank())
        fill(store, mine, range(9))
        ids = fill(store, first, range(2)), fill(store, second, range(1))
        too_large = "tenant:red", "bytes", 3 * CHUNK_BYTES, quota.bytes, CHUNK_BYTES
        for bank in (first, second):
            assert refused(lambda bank=bank: add(store, bank, 9)) == too_large
        assert (held(store, first), held(store, second)) == ids
        usage = TenantUsage(banks=2, chunks=3, tokens=6, bytes=3 * CHUNK_BYTES)
        assert access.tenant_usage("red") == usage
        long = {"long": "x" * 2000}
        assert refused(lambda: store.set_metadata(first, ids[0][0], long))[:2] == ("tenant:red", "bytes")
        assert add(store, first, 0).replayed
        access.set_tenant_quota("red", TenantQuota(chunks=3))
        assert refused(lambda: add(store, first, 9)) == ("tenant:red", "chunks", 3, 3, 1)
        # An eviction makes the room that its own write takes.
        access.set_tenant_quota("red", TenantQuota(chunks=4))
        add(store, second, 1)
        assert refused(lambda: add(store, first, 9))[:2] == ("tenant:red", "chunks")
        assert add(store, second, 2).evicted
        store.remove(first, ids[0]).result(60)
        fill(store, first, range(10, 12))
        assert refused(lambda: add(store, first, 12)) == ("tenant:red", "chunks", 4, 4, 1)
        store.delete_bank("red", "second")
        third, _ = store.create_bank(new_bank("third", tenant="red"))
        fill(store, third, range(2))
        access.set_tenant_quota("red", TenantQuota(tokens=9))
        assert refused(lambda: add(store, third, 2)) == ("tenant:red", "tokens", 8, 9, 2)
    with open_engine() as engine:
        store = engine.store
        assert engine.access.tenant_usage("red").chunks == 4
        assert refused(lambda: add(store, store.bank("red", "third"), 2)) == ("tenant:red", "tokens", 8, 9, 2)
        assert add(store, store.bank(DEFAULT_TENANT, "b"), 77).chunk_id


def refused(action: Callable[[], Any]) -> tuple[str, str, int, int, int]:
    """Return the figures of the quota that refuses an action: subject, unit, used, limit, asked for."""
    with pytest.raises(QuotaError) as caught:
        action()
    said = caught.value.metadata
    assert said["subject"] == caught.value.subject
    return said["subject"], said["unit"], int(said["usage"]), int(said["limit"]), int(said["size"])
