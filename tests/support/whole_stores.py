"""Stores with some of everything, and all that can be seen of one through the protocols of its engine: by these two
stores are compared."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import xxhash

from memory_service.domain import sessions as rules
from memory_service.domain.access import ApiKey
from memory_service.domain.model import Bank, Capacity, Condition, Expiry, Filter, Policy, Quota
from memory_service.domain.sessions import Item, Session, Turn, Window
from memory_service.domain.tenants import TenantQuota
from memory_service.storage.base import Engine, Retrievals
from tests.support.store import ALL, fill, new_bank, new_chunk
from tests.support.writing import PAYLOAD, admitted, begun, made_bank, writer

HOUR = 3600 * 1_000_000
TENANTS = ("default", "red")


def put(engine: Engine, bank: Bank, *numbers: int, **fields: Any) -> list[int]:
    """Write chunks with K-V, as a caller does, and return their ids."""
    writes = writer(engine)
    found = [
        admitted(writes, bank, replace(new_chunk(number), payload=PAYLOAD, stored_bytes=0, **fields))
        for number in numbers
    ]
    return [done.result(60).chunk_id for done in [begun(writes, each) for each in found]]


def fill_with_everything(engine: Engine) -> None:
    """Put some of everything that a store can have into an empty one."""
    store, access = engine.store, engine.access
    access.add_tenant("red", TenantQuota(banks=7, calls=3))
    access.add_key(ApiKey("k1", "red", "write", b"\1" * 32, ("n*",), 5, expires=2**60))
    access.add_key(ApiKey("k2", "default", "operator", b"\2" * 32, created=6))
    access.revoke_key("k2", 9)
    access.used_key("k1", 8)
    bank = made_bank(engine, metadata={"float": 0.1, "none": "", "flag": True}, quota=Quota(chunks=99))
    first, *_, last = put(engine, bank, *range(8))
    put(engine, bank, 8, text="a\0b \U0001f600", metadata={"x": 1e-9}, pinned=True, expiry=Expiry(9 * HOUR, True))
    store.set_metadata(bank, first, {"half": "new"})
    store.pin(bank, [first], True)
    store.count({first: Retrievals(3, store.clock.now_us(), store.clock.now_us())})
    store.remove(bank, [last]).result(60)
    store.set_aside(bank, {put(engine, bank, 9, text="as\0ide")[0]: "for a test"})
    small, _ = store.create_bank(new_bank("small", capacity=Capacity("chunks", 3), policy=Policy("lru", target=60)))
    fill(store, small, range(5))
    red, _ = store.create_bank(new_bank("notes", tenant="red", index="exact"))
    fill(store, red, range(3))
    store.create_bank(new_bank("gone"))
    store.delete_bank("default", "gone")
    fill_sessions(engine)
    engine.forgetting.chunks(bank, Filter(metadata=(Condition("number", (2,)),)), "k1")
    store.show_counts()


def fill_sessions(engine: Engine) -> None:
    """Make sessions that were forked and rewound, one with a window, and of one forget a turn."""
    sessions = engine.sessions
    for tenant in TENANTS:
        made = sessions.create(
            Session("a" * 31 + tenant[0], f"chat of {tenant}", "b", tenant=tenant, metadata={"x": "y"})
        )
        epoch = sessions.acquire(tenant, made.session_id, "w", HOUR).epoch
        sessions.append(tenant, made.session_id, epoch, 0, [_turn(f"{tenant} {number}") for number in range(40)])
        sessions.rewind(tenant, made.session_id, epoch, 30)
        sessions.append(tenant, made.session_id, epoch, 30, [_turn("another"), _turn("last", "key")])
        data = b"window of " + tenant.encode() * 99
        window = Window(made.session_id, 32, "st\0amp", len(data), xxhash.xxh3_64_intdigest(data))
        with closing(engine.windows.begin(tenant, window, epoch)) as new:
            new.add(data)
            new.keep()
        fork = Session("b" * 31 + tenant[0], "", rules.own_bank("b" * 32), tenant=tenant)
        sessions.fork(tenant, fork, made.session_id, 7)
        engine.forgetting.turns(tenant, fork.session_id, 2, 3, "k1")


def _turn(text: str, key: str = "") -> Turn:
    return Turn("completed", (Item("i", "user", text),), b"\x01\0\0\0" * 3, key=key, token_count=3)


def seen(engine: Engine) -> Mapping[str, Any]:
    """Return all that can be seen of a store, but for its identity."""
    with engine.store.read() as view:
        banks = list(view.banks_of_all())
        return {
            "banks": banks,
            "chunks": {bank.uid: list(view.page(bank, 0, ALL, embedding=True)) for bank in banks},
            "evictions": {bank.uid: [each for _, each in view.evictions(bank, 2**62)] for bank in banks},
            "payloads": {bank.uid: dict(_payloads(engine, view, bank)) for bank in banks},
            "plans": {bank.uid: engine.store.explain_eviction(bank, 1) for bank in banks},
            "tenants": engine.access.tenants(),
            "keys": engine.access.keys_of(),
            "sessions": [list(_sessions(engine, tenant)) for tenant in TENANTS],
            "usage": [engine.access.tenant_usage(tenant) for tenant in TENANTS],
        }


def _payloads(engine: Engine, view: Any, bank: Bank) -> Any:
    for chunk in view.page(bank, 0, ALL, embedding=False):
        if chunk.payload is not None:
            with closing(engine.objects.open(bank.uid, chunk.chunk_id, chunk.payload)) as source:
                rooms = [(memoryview(bytearray(tensor.length)), tensor.offset) for tensor in chunk.payload.tensors]
                yield chunk.chunk_id, [(source.read_at(*place), bytes(place[0])) for place in rooms]


def _sessions(engine: Engine, tenant: str) -> Any:
    with engine.sessions.read() as view:
        for short in view.sessions(tenant, None, {}):
            session = view.session(tenant, short.session_id)
            window = engine.windows.open(tenant, session.session_id)
            data = None
            if window is not None:
                with closing(window[1]) as source:
                    room = memoryview(bytearray(window[0].size))
                    data = (window[0], source.read_at(room, 0), bytes(room))
            yield session, (list(view.turns(session, 0, token_ids=True)), data)
