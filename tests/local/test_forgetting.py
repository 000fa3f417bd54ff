"""What was forgotten is in no file below the data folder: its bytes are looked for in raw files, while the server runs.

Before, there is a copy of what is forgotten in every place that may have one: rows, the log of SQLite, room that SQLite
no longer uses, payloads, snapshots of the index, windows, quarantine, the log of evictions, staged files.
"""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

import kvbank
from kvbank.v1 import service_pb2 as pb
from kvbank.v1 import service_pb2_grpc, session_pb2
from kvbank.wire.frames import encode
from memory_service.api.embedded import LocalServer
from memory_service.care.backup import backup
from memory_service.care.check import check
from memory_service.care.repair import repair
from memory_service.care.report import CareError
from memory_service.domain.limits import IndexLimits, Limits, Pauses
from tests.support.caller import Caller
from tests.support.forgettable import Secret, Talk, bank_of, chunk_of, found_in
from tests.support.keyed import channel
from tests.support.waiting import wait_until

# Snapshots are written after a few rows, and rows go a few at a time.
SMALL = Limits(step_rows=3, index=IndexLimits(tail_rows=4, small_rows=2, segment_rows=64))
POINTS = ("forgetting begun", "rows forgotten", "files forgotten", "all forgotten")
# Forms in which the K-V and the vector of a chunk are recognised, whatever its turn keeps.
OF_CHUNKS = ("k of", "last v of", "vector of", "half of the vector of", "vector as base64 of")


def churn(caller: Caller) -> None:
    """Write and delete chunks of many sizes, so that SQLite moves rows."""
    texts = ("x" * (97 * number % 1500) for number in range(60))
    caller.write(*(caller.chunk(text=text, layers=[]) for text in texts), bank="churn")
    ids = caller.ids("churn")
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="churn", chunk_ids=[each for each in ids if each % 3]))


def spoil(caller: Caller, data: Path, chunk_id: int, bank: str) -> None:
    """Damage the payload of a chunk, and meet the damage, so that the chunk is quarantined."""
    (path,) = data.glob(f"payloads/*/*/{chunk_id}.safetensors")
    path.write_bytes(path.read_bytes()[:-4] + b"xxxx")
    with pytest.raises(grpc.RpcError):
        caller.fetch(chunk_id, bank=bank)


def asked_of(data: Path, statement: str) -> list[Any]:
    """Ask the database of a folder, and return the rows."""
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        return database.execute(statement).fetchall()


def begin_window(talk: Talk, data: Path, begun: bytes) -> Any:
    """Send the first bytes of a window, and return the call that would send the others, when they are in its file."""
    header = session_pb2.WindowHeader(session_id=talk.session_id, epoch=talk.epoch, turn=6, stamp="s", size=1 << 20)
    more: Any = SimpleQueue()
    more.put(session_pb2.KeepWindowRequest(header=header))
    more.put(encode([begun]))
    call = talk.sessions.stub.KeepWindow(iter(more.get, None))
    call.add_callback(lambda: more.put(None))
    wait_until(lambda: any(path.read_bytes() == begun for path in data.glob("windows/*")))
    return call


class World:
    """A server with two sessions, one of which is a fork of the other, and a bank of documents; there are copies of the
    first session's turns everywhere."""

    def __init__(self, serving: Callable[..., Any], data: Path, **settings: Any) -> None:
        self.data, self.caller = data, serving(limits=SMALL, **settings)
        caller = self.caller
        caller.create("churn", layers=[])
        bank_of(caller, "shared", capacity={"chunks": 14})
        self.talk = talk = Talk.begun(caller, 1, 6, bank="shared")
        churn(caller)
        for number in range(7, 13):
            talk.say(Secret.made(number))
        fork = talk.sessions.fork(talk.session_id, turn=8)
        epoch = talk.sessions.acquire(fork.session_id, ttl=600).epoch
        self.fork = Talk(caller, talk.sessions, fork.session_id, epoch, talk.secrets[:8], [])
        for number in (21, 22):
            self.fork.say(Secret.made(number))
        for each in (talk, self.fork):
            words = "".join(secret.text for secret in each.secrets).encode()
            talk.sessions.keep(each.session_id, each.epoch, len(each.secrets), words)
        self.documents = self._written(bank_of(caller, "docs").name)
        self._evict_first()
        spoil(caller, data, talk.ids[4], "shared")
        for bank in ("shared", "docs"):
            caller.retrieve(talk.secrets[0].vector, banks=[bank], top_k=2)
        (data / "staging").mkdir(exist_ok=True)
        (data / "staging" / "left").write_bytes(talk.secrets[4].tensors)
        wait_until(lambda: len({path.parent for path in data.glob("indexes/*/*.segment")}) == 2)
        churn(caller)

    def _written(self, bank: str) -> dict[str, list[Secret]]:
        """Write two documents of five chunks."""
        found = {source: [Secret.made(first + at) for at in range(5)] for source, first in (("a", 31), ("b", 41))}
        for source, secrets in found.items():
            self.caller.write(*(chunk_of(self.caller, each, 0, source=source) for each in secrets), bank=bank)
        return found

    def _evict_first(self) -> None:
        """Let the chunk of the first turn be evicted, which is the only one that may go."""
        self.caller.pin(*self.talk.ids[1:], *self.fork.ids, bank="shared")
        self.caller.write(chunk_of(self.caller, Secret.made(90), 0), bank="shared")
        assert self.talk.ids[0] not in self.caller.ids("shared")

    def places(self, secrets: list[Secret]) -> set[str]:
        """Return the folders and files in which there is something of secrets."""
        return {where.split(" in ")[1].split("/")[0].split(" at ")[0] for where in found_in(self.data, secrets)}

    def forget(self, **target: Any) -> session_pb2.Receipt:
        stub = self.talk.sessions.stub
        receipt: session_pb2.Receipt = stub.Forget(session_pb2.ForgetRequest(**target)).receipt
        return receipt


@pytest.fixture
def world(serving: Callable[..., Any], data: Path) -> World:
    return World(serving, data)


def of_chunks(found: list[str]) -> list[str]:
    return [where for where in found if where.startswith(OF_CHUNKS)]


def test_turns_go_in_all_forks_and_what_had_attended_to_them(world: World, serving: Callable[..., Any]) -> None:
    talk, fork, data = world.talk, world.fork, world.data
    gone, behind = talk.secrets[:5], [*talk.secrets[5:], *fork.secrets[8:]]
    places, of_records = world.places(gone), {"metadata.db", "metadata.db-wal"}
    assert places - of_records == {"payloads", "indexes", "windows", "quarantine", "staging"}
    assert places & of_records
    receipt = world.forget(turns={"session_id": talk.session_id, "first": 1, "last": 5})
    assert found_in(data, gone) == []
    assert of_chunks(found_in(data, behind)) == []
    assert (receipt.turns, receipt.tokens) == (5, 60)
    # Of the first five chunks one was evicted and one is in quarantine; nine were made behind them.
    assert (len(receipt.chunks), receipt.chunks_to_make_again) == (12, 9)
    counted = {name: receipt.places[name] for name in ("objects", "windows", "quarantine", "log", "staging")}
    assert counted == {"objects": 12, "windows": 2, "quarantine": 1, "log": 1, "staging": 1}
    for each, kept in ((talk, talk.secrets[5:]), (fork, fork.secrets[5:])):
        turns = talk.sessions.turns(each.session_id, token_ids=True)
        assert [turn.status for turn in turns[:5]] == [session_pb2.TURN_STATUS_FORGOTTEN] * 5
        assert [(turn.number, turn.start, turn.token_count) for turn in turns[:5]] == [
            (number, 12 * (number - 1), 12) for number in range(1, 6)
        ]
        assert [turn.items[0].text for turn in turns[5:]] == [secret.text for secret in kept]
        assert talk.sessions.window(each.session_id) is None
    assert {each.checksum for each in receipt.chunks} != {0}
    assert world.forget(turns={"session_id": talk.session_id, "first": 1, "last": 5}) == receipt
    serving.stop()  # type: ignore[attr-defined]
    assert check(data).problems == []
    assert found_in(data, gone) == []
    caller = serving()
    assert caller.ids("shared")
    assert world.places(gone) == set()


def forget_a_document(world: World) -> None:
    """Forget one of two documents, and look at what is left."""
    caller, data, documents = world.caller, world.data, world.documents
    spoil(caller, data, caller.ids("docs")[1], "docs")
    source = {"metadata": [{"key": "source", "values": ["a"]}]}
    assert world.places(documents["a"]) >= {"payloads", "indexes", "quarantine"}
    receipt = world.forget(chunks={"bank": "docs", "filter": source})
    assert found_in(data, documents["a"]) == []
    assert [(each.bank, each.chunk_id) for each in receipt.chunks] == [
        ("docs", chunk.chunk_id) for chunk in receipt.chunks
    ]
    assert (len(receipt.chunks), receipt.tokens, receipt.places["quarantine"]) == (4, 12, 1)
    assert len(caller.ids("docs")) == 5
    header, _ = caller.retrieve(documents["a"][0].vector, banks=["docs"], top_k=9)
    assert {chunk.text for chunk in header.chunks} == {secret.text for secret in documents["b"]}
    assert world.forget(chunks={"bank": "docs", "filter": source}) == receipt
    # The keys are free: a document that is read again is written again.
    caller.write(chunk_of(caller, documents["a"][0], 0, source="a"), bank="docs")
    assert len(caller.ids("docs")) == 6


def test_a_session_goes_but_for_what_a_fork_has_and_a_document_alone(world: World, serving: Callable[..., Any]) -> None:
    talk, fork, data = world.talk, world.fork, world.data
    gone, kept = talk.secrets[8:], [*talk.secrets[1:4], *talk.secrets[5:8], *fork.secrets[8:]]
    assert world.places(gone) >= {"payloads", "indexes", "windows"}
    receipt = world.forget(session_id=talk.session_id)
    assert found_in(data, gone) == []
    assert (receipt.turns, receipt.turns_kept, receipt.chunks_to_make_again, len(receipt.chunks)) == (4, 8, 0, 4)
    for secret in kept:
        assert {where.split(" of ")[0] for where in found_in(data, [secret])} >= {"text", "token ids", "k", "vector"}
    assert talk.sessions.texts(fork.session_id) == [secret.text for secret in fork.secrets]
    assert world.forget(session_id=talk.session_id) == receipt
    forget_a_document(world)
    last = world.forget(session_id=fork.session_id)
    assert (last.turns, last.turns_kept) == (10, 0)
    assert found_in(data, [*talk.secrets, *fork.secrets]) == []
    serving.stop()  # type: ignore[attr-defined]
    assert check(data).problems == []


def test_a_step_writes_no_more_where_more_chunks_go(serving: Callable[..., Any], data: Path) -> None:
    """Forget few and many chunks, and look at the row that each step writes anew."""
    sizes = []

    def look() -> None:
        sizes.extend(asked_of(data, "SELECT length(work) FROM forgettings WHERE work IS NOT NULL"))

    caller = serving(limits=SMALL, pauses=Pauses(at={"rows forgotten": look}))
    talk = Talk.begun(caller, 1, 1)
    for bank, count in (("few", 2), ("many", 40)):
        caller.create(bank, layers=[])
        caller.write(*(caller.chunk(layers=[]) for _ in range(count)), bank=bank)
        receipt = talk.sessions.stub.Forget(session_pb2.ForgetRequest(chunks={"bank": bank})).receipt
        assert (len(receipt.chunks), caller.ids(bank)) == (count, [])
    assert sizes[0] == sizes[1]


def test_a_deleted_bank_takes_what_quarantine_has_of_it(serving: Callable[..., Any], data: Path) -> None:
    caller = serving(limits=Limits(step_rows=1))
    talk, other = (Talk.begun(caller, first, 2) for first in (1, 31))
    for each in (talk, other):
        spoil(caller, data, each.ids[0], each.bank)
    caller.stub.DeleteBank(pb.DeleteBankRequest(name=talk.bank))
    wait_until(lambda: len(list(data.glob("quarantine/*/*.json"))) == 1)
    assert [where for where in found_in(data, talk.secrets) if "quarantine" in where] == []
    assert talk.sessions.forget(other.session_id).places["quarantine"] == 1
    assert list(data.glob("quarantine/*")) == []


def test_what_an_earlier_version_has_left_of_a_deleted_bank_goes_with_a_session(
    serving: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """Put back what quarantine had of two banks before they were deleted."""
    talk = Talk.begun(serving(limits=Limits(step_rows=1)), 1, 20)
    spoil(talk.caller, data, talk.ids[2], talk.bank)
    other = Talk.begun(talk.caller, 31, 2)
    spoil(talk.caller, data, other.ids[0], other.bank)
    shutil.copytree(data / "quarantine", tmp_path / "before")
    for each in (talk, other):
        talk.caller.stub.DeleteBank(pb.DeleteBankRequest(name=each.bank))
    wait_until(lambda: asked_of(data, "SELECT count(*) FROM gone_banks") == [(0,)])
    assert list(data.glob("quarantine/*")) == []
    shutil.copytree(tmp_path / "before", data / "quarantine", dirs_exist_ok=True)
    assert talk.sessions.forget_turns(talk.session_id, 3, 4).places["quarantine"] == 1
    assert found_in(data, talk.secrets[2:4]) == []
    assert talk.sessions.forget(talk.session_id).turns == 20
    assert found_in(data, talk.secrets) == []
    assert len(list(data.glob("quarantine/*/*.json"))) == 1


def test_a_tenant_goes(serving: Callable[..., Any], data: Path) -> None:
    serving(limits=SMALL)
    address = serving.server.address  # type: ignore[attr-defined]
    with kvbank.connect(address) as owner:
        operator = owner.access.create_key("operator").secret
    with kvbank.connect(address, api_key=operator) as client:
        client.access.create_tenant("red")
        key = client.access.create_key("write", tenant="red").secret
        caller = Caller(address)
        caller.channel = channel(address, key)
        caller.stub = service_pb2_grpc.MemoryServiceStub(caller.channel)
        talk = Talk.begun(caller, 1, 6)
        talk.sessions.keep(talk.session_id, talk.epoch, 6, talk.secrets[3].text.encode())
        under_way = begin_window(talk, data, talk.secrets[4].text.encode())
        spoil(caller, data, talk.ids[2], talk.bank)
        caller.retrieve(talk.secrets[0].vector, banks=[talk.bank], top_k=2)
        wait_until(lambda: list(data.glob("indexes/*/*.segment")))
        receipt = client.access.forget_tenant("red")
        assert found_in(data, talk.secrets) == []
        under_way.cancel()
        assert (receipt.turns, receipt.tokens, len(receipt.chunks)) == (6, 72, 5)
        counted = {name: receipt.places[name] for name in ("keys", "sessions", "banks", "windows", "quarantine")}
        assert counted == dict.fromkeys(counted, 1)
        assert client.access.forget_tenant("red") == receipt
        assert [tenant.name for tenant in client.access.list_tenants()] == ["default"]
        client.access.create_tenant("red")
    serving.stop()  # type: ignore[attr-defined]
    assert check(data).problems == []


# Interruptions


def copy_if_there(source: str, target: str) -> None:
    """Copy a file, unless it has gone: snapshots are made anew at any time."""
    with suppress(FileNotFoundError):
        shutil.copyfile(source, target)


def test_a_kill_at_any_point_is_finished_by_the_next_start(
    serving: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """Copy the folder at each point, as a kill would leave it, and serve the copies."""
    copies: dict[str, Path] = {}

    def copied(point: str) -> None:
        if point not in copies:
            copies[point] = tmp_path / point
            left_out = shutil.ignore_patterns("*.socket", "*-shm")
            shutil.copytree(data, copies[point], ignore=left_out, copy_function=copy_if_there)

    at = {point: lambda point=point: copied(point) for point in POINTS}
    world = World(serving, data, pauses=Pauses(at=at))  # type: ignore[arg-type]
    gone = world.talk.secrets[:5]
    receipt = world.forget(turns={"session_id": world.talk.session_id, "first": 1, "last": 5})
    serving.stop()  # type: ignore[attr-defined]
    assert list(copies) == list(POINTS)
    for point, folder in copies.items():
        server = LocalServer(folder, durability="os", limits=SMALL)
        with kvbank.connect(server.address) as client:
            again = client.sessions.forget(world.talk.session_id, first=1, last=5)
        assert found_in(folder, gone) == [], point
        assert (again.turns, again.tokens) == (5, 60), point
        assert {each.chunk_id for each in again.chunks} == {each.chunk_id for each in receipt.chunks}, point
        server.stop()
        assert check(folder).problems == [], point


def test_a_step_that_fails_is_finished_when_it_is_asked_for_again(serving: Callable[..., Any], data: Path) -> None:
    """Forget a session with the bank that was made for it, over a storage that fails at each point."""
    failing = set(POINTS)

    def fail(point: str) -> None:
        if point in failing:
            failing.remove(point)
            raise OSError("the disk is gone")

    at = {point: lambda point=point: fail(point) for point in POINTS}
    caller = serving(limits=SMALL, pauses=Pauses(at=at))  # type: ignore[arg-type]
    talk = Talk.begun(caller, 1, 6)
    caller.retrieve(talk.secrets[0].vector, banks=[talk.bank], top_k=2)
    spoil(caller, data, talk.ids[2], talk.bank)
    wait_until(lambda: list(data.glob("indexes/*/*.segment")))
    for _ in POINTS:
        with pytest.raises(grpc.RpcError) as refused:
            talk.sessions.forget(talk.session_id)
        assert refused.value.details() == "the storage answered with an error (unknown)"
    receipt = talk.sessions.forget(talk.session_id)
    assert found_in(data, talk.secrets) == []
    assert (receipt.turns, len(receipt.chunks), receipt.places["banks"], receipt.places["quarantine"]) == (6, 5, 1, 1)
    assert [path for folder in ("payloads", "indexes") for path in (data / folder).rglob("*.s*")] == []


def test_a_write_that_a_kill_has_cut_off_brings_nothing_back(
    serving: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """Put the payload of a forgotten turn where a write leaves it that was killed before its row was there."""
    talk = Talk.begun(serving(limits=SMALL), 1, 4)
    (path,) = data.glob(f"payloads/*/*/{talk.ids[1]}.safetensors")
    late = path.read_bytes()
    talk.sessions.forget_turns(talk.session_id, 2, 2)
    serving.stop()  # type: ignore[attr-defined]
    path.write_bytes(late)
    shutil.copytree(data, tmp_path / "copy")
    serving()
    wait_until(lambda: not path.exists())
    assert found_in(data, [talk.secrets[1]]) == []
    repair(tmp_path / "copy")
    assert found_in(tmp_path / "copy", [talk.secrets[1]]) == []


def test_a_backup_that_is_under_way_ends(serving: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    talk = Talk.begun(serving(limits=SMALL), 1, 4)
    begun = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "payloads" and not begun:
            begun.append(talk.sessions.forget(talk.session_id))

    with pytest.raises(CareError, match="forgotten"):
        backup(data, tmp_path / "backup", progress=progress)
    assert found_in(tmp_path, talk.secrets) == []
    backup(data, tmp_path / "backup")
    assert found_in(tmp_path, talk.secrets) == []


def test_what_cannot_be_finished_is_told_to_nobody_else(
    serving: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    caller = serving(limits=SMALL, pauses=Pauses(at={"files dropped": lambda: hide(data / "payloads", tmp_path)}))
    talk = Talk.begun(caller, 1, 2)
    with pytest.raises(grpc.RpcError, match="not there"):
        talk.sessions.forget(talk.session_id)
    with pytest.raises(grpc.RpcError, match="there is no session"):
        talk.sessions.forget("0" * 32)
    with pytest.raises(grpc.RpcError, match="not there"):
        talk.sessions.forget(talk.session_id)
    (tmp_path / "hidden").rename(data / "payloads")


def hide(folder: Path, beside: Path) -> None:
    """Take a folder away, as a disk that is not mounted any more, if it is there."""
    if folder.exists():
        folder.rename(beside / "hidden")
