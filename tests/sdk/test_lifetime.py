"""Quota, expiry, pins, filters and indexes: what a caller says is what the service does."""

import asyncio
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

import kvbank

Make = Callable[..., kvbank.NewChunk]
MakeBank = Callable[..., str]


def test_a_bank_has_the_bounds_that_it_was_given(client: kvbank.Client, make_bank: MakeBank) -> None:
    quota, expiry = kvbank.Quota(chunks=10, bytes=10**6), kvbank.Expiry(timedelta(days=30), renew=True)
    name = make_bank(quota=quota, expiry=expiry, index="ivf", policy=kvbank.Policy("lru", target=80))
    made = client.get_bank(name)
    assert (made.quota, made.expiry, made.index) == (quota, expiry, "ivf")
    assert (made.policy.kind, made.policy.target) == ("lru", 80)


def test_a_bank_without_bounds(client: kvbank.Client, make_bank: MakeBank) -> None:
    made = client.get_bank(make_bank())
    assert (made.quota, made.expiry, made.index) == (None, None, "auto")


def test_bounds_change_one_by_one(client: kvbank.Client, make_bank: MakeBank) -> None:
    name = make_bank(quota=kvbank.Quota(tokens=5), expiry=kvbank.Expiry(timedelta(hours=1)))
    changed = client.update_bank(name, index="exact")
    assert (changed.quota, changed.expiry, changed.index) == (
        kvbank.Quota(tokens=5),
        kvbank.Expiry(timedelta(hours=1)),
        "exact",
    )
    changed = client.update_bank(name, quota=None)
    assert (changed.quota, changed.expiry) == (None, kvbank.Expiry(timedelta(hours=1)))
    changed = client.update_bank(name, expiry=None, quota=kvbank.Quota(chunks=1), index="auto")
    assert (changed.quota, changed.expiry, changed.index) == (kvbank.Quota(chunks=1), None, "auto")


def test_a_quota_refuses(client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]) -> None:
    bank = make_bank(quota=kvbank.Quota(chunks=1))
    client.write(bank, make_chunk(0), **digests)
    with pytest.raises(kvbank.QuotaExceeded) as caught:
        client.write(bank, make_chunk(1), **digests)
    assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    assert (caught.value.subject, caught.value.metadata["unit"]) == (f"bank:{bank}", "chunks")
    assert (caught.value.metadata["usage"], caught.value.metadata["limit"]) == ("1", "1")
    assert client.get_bank(bank).usage.chunks == 1


def test_pins(client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]) -> None:
    bank = make_bank(capacity=kvbank.Capacity(chunks=2))
    first = client.write(bank, make_chunk(0, pinned=True), **digests).chunk_id
    second = client.write(bank, make_chunk(1), **digests).chunk_id
    assert (client.get_chunk(bank, first).pinned, client.get_chunk(bank, second).pinned) == (True, False)
    assert client.pin_chunks(bank, [second, 2**60]) == 1
    assert [chunk.pinned for chunk in client.list_chunks(bank)] == [True, True]
    with pytest.raises(kvbank.BankFull):
        client.write(bank, make_chunk(2), **digests)
    assert client.pin_chunks(bank, [first], pinned=False) == 1
    assert client.write(bank, make_chunk(2), **digests).evicted == (first,)


def test_expiry_of_a_chunk(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    day = kvbank.Expiry(timedelta(days=1))
    bank = make_bank(expiry=day)
    chunks = [
        make_chunk(0),
        make_chunk(1, expiry=kvbank.Expiry(timedelta(hours=1), renew=True)),
        make_chunk(2, expiry=kvbank.Expiry(None)),
    ]
    ids = [written.chunk_id for written in client.write_many(bank, chunks, **digests)]
    default, own, never = (client.get_chunk(bank, chunk_id) for chunk_id in ids)
    assert default.expiry == day
    assert default.expire_time == default.create_time + timedelta(days=1)
    assert own.expiry == kvbank.Expiry(timedelta(hours=1), renew=True)
    assert own.expire_time == own.create_time + timedelta(hours=1)
    assert (never.expiry, never.expire_time) == (None, None)


@pytest.fixture
def speakers(client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]) -> str:
    """Write chunks of ann (0), bob (1, a draft), ann (2, pinned) and without a speaker (3), at starts 0, 10, 20, 30."""
    bank = make_bank()
    metadata: list[dict[str, str]] = [{"speaker": "ann"}, {"speaker": "bob", "draft": "1"}, {"speaker": "ann"}, {}]
    chunks = [make_chunk(i, metadata=said, start=10 * i, pinned=i == 2) for i, said in enumerate(metadata)]
    client.write_many(bank, chunks, **digests)
    return bank


@pytest.mark.parametrize(
    ("filter", "starts"),
    [
        (kvbank.Filter(), [0, 10, 20, 30]),
        (kvbank.Filter(metadata={"speaker": "ann"}), [0, 20]),
        (kvbank.Filter(metadata={"speaker": ["ann", "bob"]}), [0, 10, 20]),
        (kvbank.Filter(metadata={"speaker": ...}, exclude={"draft": ...}), [0, 20]),
        (kvbank.Filter(exclude={"speaker": "ann"}), [10, 30]),
        (kvbank.Filter(exclude={"speaker": {"ann", "bob"}}), [30]),
        (kvbank.Filter(metadata={"speaker": ...}, exclude={"speaker": "ann"}), [10]),
        (kvbank.Filter(start_from=10, start_before=30), [10, 20]),
        (kvbank.Filter(pinned=True), [20]),
        (kvbank.Filter(pinned=False), [0, 10, 30]),
        (kvbank.Filter(created_from=datetime(2020, 1, 1, tzinfo=UTC)), [0, 10, 20, 30]),
        (kvbank.Filter(created_before=datetime(2020, 1, 1, tzinfo=UTC)), []),
    ],
)
def test_filters(
    client: kvbank.Client,
    speakers: str,
    digests: dict[str, str],
    unit: Callable[[int], np.ndarray],
    filter: kvbank.Filter,
    starts: list[int],
) -> None:
    assert [chunk.start for chunk in client.list_chunks(speakers, filter=filter)] == starts
    found = client.retrieve(speakers, unit(0), top_k=10, filter=filter, **digests)
    assert sorted(chunk.start for chunk in found.chunks.values()) == starts
    best = client.retrieve(speakers, unit(0), top_k=1, filter=filter, **digests)
    assert len(best.chunks) == min(1, len(starts)), "it selects before the top k"


NOW = datetime.now(UTC)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (kvbank.Quota, "at least one"),
        (lambda: kvbank.Quota(chunks=0), "1 or more"),
        (lambda: kvbank.Expiry(timedelta(0)), "never"),
        (lambda: kvbank.Expiry(None, renew=True), "no ttl"),
        (lambda: kvbank.Filter(metadata={"draft": None}), "'draft'"),  # type: ignore[dict-item]
        (lambda: kvbank.Filter(exclude={"n": 3j}), "'n'"),  # type: ignore[dict-item]
        (lambda: kvbank.Filter(metadata={"n": []}), "some values"),
        (lambda: kvbank.Filter(created_from=datetime(2020, 1, 1)), "time zone"),
        (lambda: kvbank.Filter(created_from=NOW, created_before=NOW), "before it begins"),
        (lambda: kvbank.Filter(start_from=5, start_before=4), "before it begins"),
    ],
)
def test_nonsense_is_refused_before_it_is_sent(make: Callable[[], object], words: str) -> None:
    with pytest.raises(kvbank.InvalidArgument, match=words) as caught:
        make()
    assert caught.value.request_id == ""


def test_an_unknown_index(client: kvbank.Client, embedding: kvbank.EmbeddingSpec) -> None:
    with pytest.raises(kvbank.InvalidArgument, match="auto, exact, ivf"):
        client.create_bank(uuid.uuid4().hex, kv=None, embedding=embedding, index="hnsw")  # type: ignore[arg-type]


def test_the_same_for_asyncio(
    address: str, embedding: kvbank.EmbeddingSpec, make_chunk: Make, digests: dict[str, str], unit: Callable[[int], Any]
) -> None:
    async def live() -> None:
        async with kvbank.connect_async(address) as client:
            name = uuid.uuid4().hex
            day = kvbank.Expiry(timedelta(days=1))
            made = await client.create_bank(
                name, kv=None, embedding=embedding, quota=kvbank.Quota(chunks=2), expiry=day, index="exact"
            )
            assert (made.quota, made.expiry, made.index) == (kvbank.Quota(chunks=2), day, "exact")
            chunks = [make_chunk(i, dtype=None, metadata={"i": str(i)}) for i in range(3)]
            without_reader = {**digests, "reader_digest": ""}
            first, _ = await client.write_many(name, chunks[:2], **without_reader)
            with pytest.raises(kvbank.QuotaExceeded):
                await client.write(name, chunks[2], **without_reader)
            assert await client.pin_chunks(name, [first.chunk_id]) == 1
            pinned = kvbank.Filter(pinned=True)
            assert [chunk.chunk_id async for chunk in client.list_chunks(name, filter=pinned)] == [first.chunk_id]
            only = kvbank.Filter(metadata={"i": "1"}, exclude={"j": ...})
            found = await client.retrieve(name, unit(0), filter=only, embedder_digest=digests["embedder_digest"])
            assert [chunk.metadata["i"] for chunk in found.chunks.values()] == ["1"]
            changed = await client.update_bank(name, quota=None, expiry=None, index="auto")
            assert (changed.quota, changed.expiry, changed.index) == (None, None, "auto")
            (state,) = (await client.stats([name])).banks
            assert (state.bank.usage.chunks, state.index.kind) == (2, "exact")

    asyncio.run(live())
