"""Banks and evictions through the real service."""

import asyncio
import uuid
from collections.abc import Callable

import pytest

import kvbank
from kvbank.v1 import bank_pb2
from tests.cli.tree import commands, type_of

MakeBank = Callable[..., str]
POLICIES = [name.removeprefix("POLICY_KIND_").lower() for name in bank_pb2.PolicyKind.keys()[1:]]


def test_a_bank_is_what_was_asked_for(
    client: kvbank.Client, kv: kvbank.KVSpec, embedding: kvbank.EmbeddingSpec
) -> None:
    name = uuid.uuid4().hex
    policy = kvbank.Policy(lower=5, upper=80, target=60)
    capacity = kvbank.Capacity(tokens=1000)
    made = client.create_bank(
        name, kv=kv, embedding=embedding, capacity=capacity, policy=policy, metadata={"for": "a test"}
    )
    assert made == client.get_bank(name)
    assert (made.name, made.kv, made.embedding, made.capacity, made.policy) == (name, kv, embedding, capacity, policy)
    assert made.metadata == {"for": "a test"}
    assert made.usage == kvbank.BankUsage(0, 0, 0, 0, 0, 0, 0, 0)
    assert made.uid


@pytest.mark.parametrize("kind", POLICIES)
def test_policies(client: kvbank.Client, make_bank: MakeBank, kind: str) -> None:
    assert client.get_bank(make_bank(policy=kvbank.Policy(kind))).policy.kind == kind


def test_every_policy_can_be_chosen_at_the_command_line() -> None:
    (policy,) = (option for option in dict(commands())["bank", "update"].params if option.name == "policy")
    assert {word for word in POLICIES if f"'{word}'" in type_of(policy)} == set(POLICIES)


def test_exist_ok(client: kvbank.Client, kv: kvbank.KVSpec, embedding: kvbank.EmbeddingSpec) -> None:
    name = uuid.uuid4().hex
    made = client.create_bank(name, kv=kv, embedding=embedding, metadata={"first": "yes"})
    again = client.create_bank(name, kv=kv, embedding=embedding, exist_ok=True)
    assert (again.uid, again.metadata) == (made.uid, {"first": "yes"})
    with pytest.raises(kvbank.AlreadyExists, match="exists"):
        client.create_bank(name, kv=kv, embedding=embedding)
    with pytest.raises(kvbank.AlreadyExists):
        client.create_bank(name, kv=None, embedding=embedding, exist_ok=True)


def test_update_changes_what_is_given(client: kvbank.Client, make_bank: MakeBank) -> None:
    name = make_bank(capacity=kvbank.Capacity(chunks=5), metadata={"a": "1"})
    assert client.update_bank(name, metadata={"b": "2"}).capacity == kvbank.Capacity(chunks=5)
    changed = client.update_bank(name, capacity=kvbank.Capacity(bytes=10**6), policy=kvbank.Policy("reject"))
    assert (changed.capacity, changed.policy.kind) == (kvbank.Capacity(bytes=10**6), "reject")
    unbounded = client.update_bank(name, capacity=None)
    assert unbounded.capacity is None
    assert unbounded.metadata == {"b": "2"}
    assert unbounded.policy.kind == "reject"


def test_delete(client: kvbank.Client, make_bank: MakeBank) -> None:
    name = make_bank()
    client.delete_bank(name)
    client.delete_bank(name, missing_ok=True)
    with pytest.raises(kvbank.BankNotFound):
        client.delete_bank(name)


def test_all_banks_are_listed(address: str, client: kvbank.Client, make_bank: MakeBank) -> None:
    made = {make_bank(None) for _ in range(120)}
    assert made <= {bank.name for bank in client.list_banks()}

    async def names() -> set[str]:
        async with kvbank.connect_async(address) as other:
            return {bank.name async for bank in other.list_banks()}

    assert made <= asyncio.run(names())


def test_evictions_are_explained_and_logged(
    client: kvbank.Client,
    make_bank: MakeBank,
    make_chunk: Callable[..., kvbank.NewChunk],
    digests: dict[str, str],
) -> None:
    bank = make_bank(capacity=kvbank.Capacity(chunks=10), policy=kvbank.Policy(target=80))
    ids = [client.write(bank, make_chunk(i), **digests).chunk_id for i in range(10)]
    explained = client.explain_eviction(bank)
    assert explained[0].chunk_id == ids[0]
    assert explained[0].reason == "oldest"
    assert explained[0].evict_time is None
    written = client.write(bank, make_chunk(10), **digests)
    assert ids[0] in written.evicted
    went = list(client.list_evictions(bank))
    assert {eviction.chunk_id for eviction in went} >= set(written.evicted)
    assert all(eviction.evict_time is not None for eviction in went)
    assert client.get_bank(bank).usage.chunks_evicted == len(went)


def test_an_explanation_says_why_also_where_nothing_can_go(
    address: str,
    client: kvbank.Client,
    make_bank: MakeBank,
    make_chunk: Callable[..., kvbank.NewChunk],
    digests: dict[str, str],
) -> None:
    bank = make_bank(capacity=kvbank.Capacity(chunks=2), policy=kvbank.Policy(target=50))
    empty = client.explain_eviction(bank)
    assert (empty, empty.explanation) == ([], "")
    ids = [client.write(bank, make_chunk(i), **digests).chunk_id for i in range(2)]
    explained = client.explain_eviction(bank)
    assert [eviction.chunk_id for eviction in explained] == ids[:1]
    assert "1 of 2 chunks would go" in explained.explanation
    client.pin_chunks(bank, ids)

    async def ask() -> kvbank.EvictionPlan:
        async with kvbank.connect_async(address) as other:
            return await other.explain_eviction(bank)

    for answer in (client.explain_eviction(bank), asyncio.run(ask())):
        assert answer == []
        assert "pinned chunks, which stay, take 2" in answer.explanation
