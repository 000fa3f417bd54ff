"""Sessions through both clients, against a real service."""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

import kvbank
from tests.sdk.host import Host
from tests.sdk.relay import Relay


def said(number: int, tokens: int = 3) -> kvbank.Turn:
    """Return a turn to append, with something in every field."""
    items = [kvbank.Item("user", f"question {number}", id=f"q{number}"), kvbank.Item("assistant", f"answer {number}")]
    return kvbank.Turn(
        items,
        range(number, number + tokens),
        prompt_tokens=1,
        kept=number,
        usage={"read": number},
        metadata={"n": str(number)},
    )


def talk(client: kvbank.Client, turns: int, **options: Any) -> kvbank.Session:
    """Make a session of so many turns, and return it without a lease."""
    session = client.sessions.create(**options)
    if turns:
        lease = client.sessions.acquire(session.session_id, "test").lease
        assert lease is not None
        for head in range(0, turns, 100):
            some = [said(number) for number in range(head + 1, min(head + 100, turns) + 1)]
            client.sessions.append(session.session_id, some, epoch=lease.epoch, follows=head)
        client.sessions.release(session.session_id, lease.epoch)
    return client.sessions.get(session.session_id)


def test_a_session_is_what_it_was_made_of(client: kvbank.Client) -> None:
    name = uuid.uuid4().hex
    about: dict[str, Any] = {"settings": {"model": "small"}, "metadata": {"who": "ann"}, "reader_digest": "ab" * 32}
    made = client.sessions.create(name=name, ttl=timedelta(days=1), **about)
    assert (made.name, made.head, made.tokens, made.lease, made.forked_from) == (name, 0, 0, None, None)
    assert (made.settings, made.metadata, made.reader_digest) == tuple(about.values())
    assert made.bank == f"session-{made.session_id[:16]}"
    assert made.expire_time is not None
    assert made.expire_time - made.create_time <= timedelta(days=1, seconds=1)
    assert client.sessions.get(made.session_id) == client.sessions.get(name=name) == made
    assert made in list(client.sessions.list({"who": "ann"}))
    assert made not in list(client.sessions.list({"who": "bob"}))
    with pytest.raises(kvbank.SessionExists) as exists:
        client.sessions.create(name=name)
    assert isinstance(exists.value, kvbank.AlreadyExists)
    with pytest.raises(kvbank.SessionNotFound):
        client.sessions.get("0" * 32)
    changed = client.sessions.update(made.session_id, name="", metadata={}, ttl=None)
    assert (changed.name, changed.metadata, changed.settings, changed.expire_time) == ("", {}, {"model": "small"}, None)


def test_turns_are_appended_by_whoever_has_the_lease(client: kvbank.Client) -> None:
    session = client.sessions.create()
    held = client.sessions.acquire(session.session_id, "one", ttl=timedelta(seconds=30))
    assert held.lease is not None
    with pytest.raises(kvbank.LeaseHeld) as refused:
        client.sessions.acquire(session.session_id, "two")
    assert refused.value.holder == "one"
    assert 0 < (refused.value.retry_after or 0) <= 31
    first, second = said(1), said(2)
    append = client.sessions.append
    turns, now = append(session.session_id, [first, second], epoch=held.lease.epoch, follows=0)
    assert [(turn.number, turn.start, turn.token_count, turn.items) for turn in turns] == [
        (1, 0, 3, first.items),
        (2, 3, 3, second.items),
    ]
    assert (now.head, now.tokens) == (2, 6)
    again, _ = append(session.session_id, [first, second], epoch=held.lease.epoch, follows=0)
    assert again == turns
    with pytest.raises(kvbank.TurnConflict) as conflict:
        append(session.session_id, [said(3)], epoch=held.lease.epoch, follows=1)
    assert conflict.value.metadata["head"] == "2"
    assert list(client.sessions.turns(session.session_id, token_ids=True)) == turns
    listed = list(client.sessions.turns(session.session_id, after=1, page_size=1))
    assert [(turn.number, turn.token_ids, turn.token_count) for turn in listed] == [(2, (), 3)]
    assert client.sessions.turn(second.key, token_ids=True) == turns[1]
    with pytest.raises(kvbank.TurnNotFound):
        client.sessions.turn("none")
    later = client.sessions.acquire(session.session_id, "one").lease
    assert later is not None
    assert later.epoch > held.lease.epoch
    with pytest.raises(kvbank.LeaseLost):
        client.sessions.renew(session.session_id, held.lease.epoch)
    assert client.sessions.renew(session.session_id, later.epoch).epoch == later.epoch
    client.sessions.release(session.session_id, later.epoch)
    with pytest.raises(kvbank.LeaseLost):
        client.sessions.release(session.session_id, held.lease.epoch)
    with pytest.raises(kvbank.LeaseLost):
        append(session.session_id, [said(3)], epoch=later.epoch, follows=2)


def test_forks_and_rewinds_share_what_was_said_before(client: kvbank.Client) -> None:
    session = talk(client, 3)
    fork = client.sessions.fork(session.session_id, turn=2, metadata={"kind": "fork"})
    assert fork.forked_from == kvbank.TurnPoint(session.session_id, 2)
    assert (fork.head, fork.tokens, fork.bank, fork.metadata) == (2, 6, session.bank, {"kind": "fork"})
    turns = list(client.sessions.turns(session.session_id))
    assert list(client.sessions.turns(fork.session_id)) == turns[:2]
    lease = client.sessions.acquire(session.session_id, "test").lease
    assert lease is not None
    rewound = client.sessions.rewind(session.session_id, 1, epoch=lease.epoch)
    assert (rewound.head, rewound.tokens) == (1, 3)
    assert client.sessions.turn(turns[2].key).number == 3
    assert list(client.sessions.turns_to(turns[2].key, page_size=2)) == turns
    back = client.sessions.fork(session.session_id, turn_key=turns[2].key)
    assert list(client.sessions.turns(back.session_id)) == turns
    with pytest.raises(kvbank.TurnNotFound):
        client.sessions.fork(session.session_id, turn=9)
    with pytest.raises(kvbank.InvalidArgument, match="not both"):
        client.sessions.fork(session.session_id, turn=1, turn_key=turns[0].key)


def test_the_filter_of_a_session_selects_its_own_chunks(
    client: kvbank.Client, embedding: kvbank.EmbeddingSpec, unit: Callable[[int], np.ndarray]
) -> None:
    session = talk(client, 2)
    client.create_bank(session.bank, kv=None, embedding=embedding)
    fork = client.sessions.fork(session.session_id, turn=1)
    (cut, own), (branch,) = fork.stretches, session.stretches
    assert (cut.branch, cut.start_before, own.start_before) == (branch.branch, 3, None)

    def write(branch: str, start: int) -> int:
        chunk = kvbank.NewChunk(unit(1), start=start, metadata={"branch": branch, "turn": 1})
        digest = embedding.embedder_digest
        return client.write(session.bank, chunk, reader_digest="", embedder_digest=digest).chunk_id

    shared, of_session, of_fork = write(branch.branch, 0), write(branch.branch, 3), write(own.branch, 3)

    def found(session: kvbank.Session) -> list[int]:
        digest = embedding.embedder_digest
        answer = client.retrieve(session.bank, unit(1), filter=session.filter, embedder_digest=digest)
        listed = [chunk.chunk_id for chunk in client.list_chunks(session.bank, filter=session.filter)]
        assert listed == sorted(answer.chunks)
        return listed

    assert found(session) == [shared, of_session]
    assert found(fork) == [shared, of_fork]


@pytest.mark.parametrize("times", [104, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_session_is_rewound_and_searched_however_often(
    client: kvbank.Client, embedding: kvbank.EmbeddingSpec, unit: Callable[[int], np.ndarray], times: int
) -> None:
    """Give each branch a turn that stays and one that is rewound from, and a chunk of each."""
    session = client.sessions.acquire(client.sessions.create().session_id, "w")
    client.create_bank(session.bank, kv=None, embedding=embedding)
    assert session.lease is not None
    id_, epoch = session.session_id, session.lease.epoch
    chunks = []
    for number in range(times):
        made = [kvbank.Turn(token_ids=[number]), kvbank.Turn(token_ids=[0])]
        session = client.sessions.append(id_, made, epoch=epoch, follows=number)[1]
        for start in (number, number + 1):
            marks = {"branch": session.stretches[-1].branch, "stays": start == number}
            chunks.append(kvbank.NewChunk(unit(1), start=start, metadata=marks))
        session = client.sessions.rewind(id_, number + 1, epoch=epoch)
    assert len(session.stretches) == times + 1
    assert [turn.token_ids for turn in client.sessions.turns(id_, token_ids=True)] == [(at,) for at in range(times)]
    digests = {"embedder_digest": embedding.embedder_digest}
    client.write_many(session.bank, chunks, reader_digest="", **digests)
    fork = client.sessions.fork(id_, turn=times // 2)
    for one, own in ((session, times), (fork, times // 2)):
        found = list(
            client.retrieve(
                session.bank, unit(1), filter=one.filter, top_k=min(2 * times, 1000), **digests
            ).chunks.values()
        )
        assert sorted(chunk.start for chunk in found) == list(range(own))
        assert all(chunk.metadata["stays"] for chunk in found)


def test_alternatives_are_filters_without_alternatives(client: kvbank.Client, make_bank: Callable[..., str]) -> None:
    bank = make_bank(None)
    nested = kvbank.Filter(any_of=[kvbank.Filter(pinned=True)])
    for wrong in ([nested], [kvbank.Filter()] * 101, ["pinned"], kvbank.Filter()):
        with pytest.raises(kvbank.InvalidArgument, match="any_of"):
            kvbank.Filter(any_of=wrong)  # type: ignore[arg-type]
    for wrong in ([kvbank.Stretch("b")] * 10_001, ["b"], "b"):
        with pytest.raises(kvbank.InvalidArgument, match="stretches"):
            kvbank.Filter(stretches=wrong)  # type: ignore[arg-type]
    assert list(client.list_chunks(bank, filter=nested)) == []


def test_alternatives_are_not_asked_of_a_server_that_would_ignore_them(
    host: Host, relay: Relay, unit: Callable[[int], np.ndarray], digests: dict[str, str]
) -> None:
    from kvbank.v1 import service_pb2

    def earlier(frames: list[bytes]) -> list[bytes]:
        info = service_pb2.GetServerInfoResponse.FromString(frames[0])
        info.ClearField("alternatives")
        return [info.SerializeToString()]

    alternatives = kvbank.Filter(any_of=[kvbank.Filter(pinned=True)])
    stretches = kvbank.Filter(stretches=[kvbank.Stretch("branch")])
    calls: list[Callable[[kvbank.Client], Any]] = [
        lambda client: client.retrieve("b", unit(1), filter=alternatives, **digests),
        lambda client: list(client.list_chunks("b", filter=alternatives)),
        lambda client: client.retrieve("b", unit(1), filter=stretches, **digests),
    ]
    for call in calls:
        with kvbank.connect(relay.address) as client:
            call(client)
        relay.change("GetServerInfo", earlier)
        with kvbank.connect(relay.address) as client, pytest.raises(kvbank.FailedPrecondition) as refused:
            call(client)
        assert refused.value.reason == "FILTER_ALTERNATIVES"
        relay.change("GetServerInfo", list)


def test_a_window_comes_back_as_it_was_kept(client: kvbank.Client, address: str) -> None:
    session = talk(client, 2)
    assert client.sessions.read_window(session.session_id) is None
    assert client.sessions.window_size(session.session_id) == 0
    lease = client.sessions.acquire(session.session_id, "test").lease
    assert lease is not None
    for data, turn in ((b"small", 1), (bytes(range(256)) * 10_000, 2)):
        kept: Any = memoryview(data)
        client.sessions.keep_window(session.session_id, kept, epoch=lease.epoch, turn=turn, stamp=f"s{turn}")
        assert client.sessions.read_window(session.session_id) == kvbank.Window(turn, f"s{turn}", data)
        assert client.sessions.window_size(session.session_id) == len(data)
    with pytest.raises(kvbank.LeaseLost):
        client.sessions.keep_window(session.session_id, b"x", epoch=lease.epoch - 1, turn=2, stamp="")

    async def both_ways() -> kvbank.Window | None:
        async with kvbank.connect_async(address) as other:
            await other.sessions.keep_window(session.session_id, b"y" * 3_000_000, epoch=lease.epoch, turn=2, stamp="a")
            with pytest.raises(kvbank.LeaseLost):
                await other.sessions.keep_window(session.session_id, b"x", epoch=lease.epoch - 1, turn=2, stamp="")
            assert await other.sessions.window_size(session.session_id) == 3_000_000
            return await other.sessions.read_window(session.session_id)

    assert asyncio.run(both_ways()) == kvbank.Window(2, "a", b"y" * 3_000_000)


def test_a_window_that_changes_on_the_way_is_not_taken(host: Host, relay: Relay) -> None:
    session = talk(host.client, 1)
    lease = host.client.sessions.acquire(session.session_id, "test").lease
    assert lease is not None
    host.client.sessions.keep_window(session.session_id, b"window", epoch=lease.epoch, turn=1, stamp="")
    relay.change("ReadWindow", lambda frames: [frame.replace(b"window", b"wind0w") for frame in frames])
    with kvbank.connect(relay.address) as client, pytest.raises(kvbank.DataLoss):
        client.sessions.read_window(session.session_id)


def test_the_size_of_a_window_is_told_without_its_bytes(host: Host, relay: Relay) -> None:
    """Change what comes behind the header: who asks for the size alone does not see it."""
    session = talk(host.client, 1)
    lease = host.client.sessions.acquire(session.session_id, "test").lease
    assert lease is not None
    host.client.sessions.keep_window(session.session_id, b"window" * 1000, epoch=lease.epoch, turn=1, stamp="")
    relay.change("ReadWindow", lambda frames: [frames[0], frames[0], *frames[1:]])
    with kvbank.connect(relay.address) as client:
        assert client.sessions.window_size(session.session_id) == 6000
        with pytest.raises(kvbank.Internal):
            client.sessions.read_window(session.session_id)


def test_the_asyncio_client_does_the_same(address: str) -> None:
    async def run() -> None:
        async with kvbank.connect_async(address) as client:
            sessions, name = client.sessions, uuid.uuid4().hex
            made = await sessions.create(name=name, metadata={"run": name})
            held = await sessions.acquire(made.session_id, "async")
            assert held.lease is not None
            turns, now = await sessions.append(made.session_id, [said(1), said(2)], epoch=held.lease.epoch, follows=0)
            assert [turn async for turn in sessions.turns(made.session_id, token_ids=True)] == turns
            assert await sessions.turn(turns[0].key, token_ids=True) == turns[0]
            await sessions.renew(made.session_id, held.lease.epoch)
            rewound = await sessions.rewind(made.session_id, 1, epoch=held.lease.epoch)
            assert (now.head, rewound.head) == (2, 1)
            await sessions.release(made.session_id, held.lease.epoch)
            assert [turn async for turn in sessions.turns_to(turns[1].key, token_ids=True)] == turns
            fork = await sessions.fork(made.session_id, turn_key=turns[1].key)
            assert fork.head == 2
            await sessions.update(made.session_id, name="")
            assert [each.session_id async for each in sessions.list({"run": name})] == [made.session_id]
            with pytest.raises(kvbank.SessionNotFound):
                await sessions.get(name=name)

    asyncio.run(run())


def test_a_call_whose_answer_is_lost_is_done_once(host: Host, relay: Relay) -> None:
    """Cut the connection behind each call that changes something, after the service has done it."""
    session = talk(host.client, 1)
    with kvbank.connect(relay.address) as client:
        sessions = client.sessions

        def repeated(method: str, call: Callable[[], Any]) -> Any:
            relay.calls.clear()
            relay.lose_once(method)
            found = call()
            assert relay.calls.count(method) == 2
            return found

        made = repeated("CreateSession", lambda: sessions.create(name="lost", metadata={"a": "b"}))
        assert made == sessions.get(name="lost")
        fork = repeated("ForkSession", lambda: sessions.fork(session.session_id, name="forked", turn=1))
        assert fork == sessions.get(name="forked")
        lease = repeated("AcquireLease", lambda: sessions.acquire(session.session_id, "me")).lease
        turns, now = repeated(
            "AppendTurns", lambda: sessions.append(session.session_id, [said(2)], epoch=lease.epoch, follows=1)
        )
        assert ([turn.number for turn in turns], now.head) == ([2], 2)
        assert repeated("RewindSession", lambda: sessions.rewind(session.session_id, 1, epoch=lease.epoch)).head == 1
        repeated("ReleaseLease", lambda: sessions.release(session.session_id, lease.epoch))
        assert sessions.get(session.session_id).lease is None


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("session_id", lambda sessions: sessions.get()),
        ("session_id", lambda sessions: sessions.get("a", name="b")),
        ("session_id", lambda sessions: sessions.get(7)),
        ("turns", lambda sessions: sessions.append("a", [], epoch=1, follows=0)),
        ("turns", lambda sessions: sessions.append("a", ["hello"], epoch=1, follows=0)),
        ("turns", lambda sessions: sessions.append("a", kvbank.Turn(), epoch=1, follows=0)),
        ("status", lambda sessions: sessions.append("a", [kvbank.Turn(status="odd")], epoch=1, follows=0)),
        ("epoch", lambda sessions: sessions.append("a", [kvbank.Turn()], epoch="1", follows=0)),
        ("ttl", lambda sessions: sessions.acquire("a", "b", ttl=30)),
        ("ttl", lambda sessions: sessions.create(ttl=timedelta(-1))),
        ("metadata", lambda sessions: sessions.create(metadata={"n": 1})),
        ("settings", lambda sessions: sessions.update("a", settings=["n"])),
        ("reads", lambda sessions: sessions.update("a", reads="bank")),
        ("data", lambda sessions: sessions.keep_window("a", "text", epoch=1, turn=1, stamp="")),
        ("data", lambda sessions: sessions.keep_window("a", memoryview(b"abcd")[::2], epoch=1, turn=1, stamp="")),
        ("first", lambda sessions: sessions.forget("a", first=2, last=1)),
        ("token_ids", lambda _: kvbank.Turn([], [-1])),
        ("items", lambda _: kvbank.Turn(["hello"])),
        ("usage", lambda _: kvbank.Turn(usage={"tokens": "3"})),
        ("text", lambda _: kvbank.Item("user", b"hello")),
        ("path", lambda sessions: list(sessions.import_(None))),
        ("path", lambda sessions: list(sessions.import_("/nowhere"))),
    ],
)
def test_a_wrong_argument_is_named(client: kvbank.Client, field: str, call: Callable[[Any], Any]) -> None:
    with pytest.raises(kvbank.InvalidArgument) as refused:
        call(client.sessions)
    assert refused.value.metadata["field"] == field


def test_a_turn_without_a_key_is_refused_before_it_is_sent(client: kvbank.Client) -> None:
    session = client.sessions.create()
    lease = client.sessions.acquire(session.session_id, "test").lease
    assert lease is not None
    with pytest.raises(kvbank.InvalidArgument, match="key is empty"):
        client.sessions.append(session.session_id, [kvbank.Turn(key="")], epoch=lease.epoch, follows=0)
    assert client.sessions.get(session.session_id).head == 0


def test_a_receipt_counts_chunks_that_it_does_not_name(client: kvbank.Client) -> None:
    receipt = client.sessions.forget(talk(client, 2).session_id)
    assert (receipt.turns, receipt.chunk_count) == (2, 0)
    assert replace(receipt, places={"rows": 20_002}).chunk_count == 20_000
