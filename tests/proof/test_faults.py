"""The disk fails in every step of what the store does: one clear error, nothing acknowledged lost, others served."""

import copy
import errno
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

import kvbank
from tests.faults.shim import CHANGES, Action, Op, Rule
from tests.local.test_schema import to_0001
from tests.proof.content import DIGESTS, EMBEDDING, KV, READER, chunk_of, differences, new_key, vector_of
from tests.proof.journal import Promises
from tests.proof.once import Once, reason_of
from tests.proof.verify import verify
from tests.support.service_process import Service, StartFailed
from tests.support.synced import skip_where_files_are_synced_one_by_one, wait_until_synced
from tests.support.waiting import wait_until

BANK = "b"
CLEAR = {"STORAGE_ERROR", "DISK_FULL"}
FAULTS = {
    "EIO": (Action.FAIL, errno.EIO),
    "ENOSPC": (Action.FAIL, errno.ENOSPC),
    "torn": (Action.TORN, errno.EIO),
    "short": (Action.SHORT, 0),
}


def faults(*quick: str, slow: Iterable[str] = FAULTS) -> pytest.MarkDecorator:
    """Try the faults `quick` in the quick tests, and those of `slow` that are none of them in the slow ones."""
    marks = dict.fromkeys(slow, pytest.mark.slow) | dict.fromkeys(quick, ())
    cases = [pytest.param(*FAULTS[name], id=name, marks=mark) for name, mark in marks.items()]
    return pytest.mark.parametrize(("action", "value"), cases)


@pytest.fixture
def data(disk) -> Path:
    return disk.root / "data"


def _fill(address: str, chunks: int = 6, **bank: object) -> Promises:
    """Make a bank with some chunks."""
    promises = Promises(BANK)
    with kvbank.connect(address) as client:
        client.create_bank(BANK, kv=KV, embedding=EMBEDDING, **bank)
        promises.exists = True
        for result, key in zip(*_written(client, chunks), strict=True):
            promises.acknowledged[result.chunk_id] = key
    return promises


def _written(client: kvbank.Client, chunks: int) -> tuple[list[kvbank.WriteResult], list[bytes]]:
    keys = [new_key(tokens=3) for _ in range(chunks)]
    return client.write_many(BANK, map(chunk_of, keys), **DIGESTS), keys


def _check(address: str, promises: Promises) -> None:
    with kvbank.connect(address) as client:
        verdict = verify(client, promises)
    assert verdict.holds, verdict


def _each_step(disk, action: Action, value: int = errno.EIO, every: int = 1) -> Iterator[Rule]:
    """Plan the fault at the first, second, ... change that the body makes, until it makes none that far."""
    for nth in itertools.count(1, every):
        rule = disk.rule(action, CHANGES, nth=nth, value=value)
        yield rule
        disk.clear()
        if not rule.fired:
            return


def _error_of(call: Callable[[], object]) -> grpc.RpcError | None:
    try:
        call()
    except grpc.RpcError as error:
        return error
    return None


@pytest.mark.parametrize("tokens", [40, 250], ids=["small", "large"])
@faults("EIO", "torn")
def test_a_fault_in_any_step_of_a_write(disk, faulty_host, data, action, value, tokens):
    """Evictions are among the steps, because the bank is small. What failed is written again, by its key."""
    service = faulty_host.start(data)
    promises, failed = _fill(service.address, capacity=kvbank.Capacity(chunks=8)), 0
    with Once(service.address) as client:
        for _ in _each_step(disk, action, value):
            key = new_key(tokens=tokens)
            error = _error_of(lambda key=key: client.write(BANK, chunk_of(key)))
            assert error is None or reason_of(error) in CLEAR, error
            failed += error is not None
            disk.clear()
            (ack,) = client.write(BANK, chunk_of(key))
            promises.acknowledged[ack.chunk_id] = key
            promises.evicted.update(ack.evicted_chunk_ids)
    assert (failed > 8) == (action is not Action.SHORT)
    _check(service.address, promises)
    assert service.stop() == 0
    _check(faulty_host.start(data).address, promises)


def test_a_disk_that_fails_to_sync_as_a_whole(disk, faulty_host, data):
    """Make each small file again then, and sync it by itself, before its bytes leave the records."""
    skip_where_files_are_synced_one_by_one(disk.root)
    whole = disk.rule(Action.FAIL, Op.SYNC, "the whole disk", repeat=True)
    single = disk.rule(Action.OFF, Op.SYNC, ".tmp", slot=1)
    service = faulty_host.start(data)
    promises = _fill(service.address)
    wait_until_synced(data)
    assert whole.fired
    assert single.seen >= len(promises.acknowledged)
    _check(service.address, promises)


def test_a_chunk_that_goes_while_its_file_is_made_again_leaves_none(disk, faulty_host, data):
    skip_where_files_are_synced_one_by_one(disk.root)
    whole = disk.rule(Action.FAIL, Op.SYNC, "the whole disk", repeat=True)
    service = faulty_host.start(data)
    promises = _fill(service.address, chunks=1)
    (chunk_id,) = promises.acknowledged
    (path,) = data.glob("payloads/*/*/*.safetensors")
    slow = disk.rule(Action.SLOW, Op.RENAME, path.name, value=1000, slot=1)
    with kvbank.connect(service.address) as client:
        wait_until(lambda: slow.fired, "the file is not made again")
        assert client.delete_chunks(BANK, [chunk_id]) == 1
    assert service.stop() == 0
    assert whole.fired
    assert not path.exists()


def test_a_fault_in_any_step_of_taking_over_a_staged_file(disk, faulty_host, data):
    """Clients write again, or over the stream, without a word."""
    service = faulty_host.start(data, same_host=True)
    promises = _fill(service.address, capacity=kvbank.Capacity(chunks=8))
    with kvbank.connect(service.address) as client:
        for _ in _each_step(disk, Action.FAIL):
            key = new_key(tokens=200)  # too many bytes to go with the header
            result = client.write(BANK, chunk_of(key), **DIGESTS)
            promises.acknowledged[result.chunk_id] = key
            promises.evicted.update(result.evicted)
    _check(service.address, promises)
    assert service.stop() == 0
    _check(faulty_host.start(data).address, promises)
    assert list((data / "staging").iterdir()) == []


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_in_any_step_of_a_write(disk, faulty_host, data, every):
    """Half of a write is done, or all of another step."""
    service = faulty_host.start(data)
    promises = _fill(service.address, capacity=kvbank.Capacity(chunks=8))
    for rule in _each_step(disk, Action.TORN_KILL, every=every):
        key = new_key(tokens=40)
        with Once(service.address) as client:
            error = _error_of(lambda key=key: client.write(BANK, chunk_of(key)))
        assert error is None or (error.code(), rule.fired) == (grpc.StatusCode.UNAVAILABLE, 1), error
        disk.clear()
        if rule.fired:
            assert service.wait() == -9
            service = faulty_host.start(data)
        with Once(service.address) as client:
            (ack,) = client.write(BANK, chunk_of(key))
        promises.acknowledged[ack.chunk_id] = key
        promises.evicted.update(ack.evicted_chunk_ids)
        _check(service.address, promises)


@faults("ENOSPC", "short")
def test_a_fault_in_any_step_of_a_delete(disk, faulty_host, data, action, value):
    service = faulty_host.start(data)
    promises = _fill(service.address, chunks=40)
    with Once(service.address) as client:
        for _, chunk_id in zip(_each_step(disk, action, value), list(promises.acknowledged), strict=False):
            promises.deleting.add(chunk_id)
            error = _error_of(lambda chunk_id=chunk_id: client.delete(BANK, [chunk_id]))
            assert error is None or reason_of(error) in CLEAR, error
            disk.clear()
            client.delete(BANK, [chunk_id])
            promises.deleted.add(chunk_id)
    _check(service.address, promises)
    assert service.stop() == 0
    _check(faulty_host.start(data).address, promises)


class Left(NamedTuple):
    """A folder as somebody left it; `lay_out` puts it there anew, `start` serves it."""

    lay_out: Callable[[], None]
    start: Callable[[], Service | StartFailed]
    promises: Promises


@pytest.fixture(params=["killed", pytest.param("older", marks=pytest.mark.slow)])
def left(request, faulty_host, data, tmp_path) -> Left:
    """Make a folder that was left by a kill, with a log of SQLite to recover and an orphan; or by the release before,
    with another schema."""
    service = faulty_host.start(data)
    promises = _fill(service.address, chunks=12, capacity=kvbank.Capacity(chunks=10))
    _check(service.address, promises)
    if request.param == "killed":
        service.kill()
        (next((data / "payloads").glob("*/*")) / "9.tmp").write_bytes(b"half a payl")
    else:
        service.stop()
        to_0001(data)
    shutil.copytree(data, tmp_path / "left")

    def lay_out() -> None:
        shutil.rmtree(data)
        shutil.copytree(tmp_path / "left", data)

    def start() -> Service | StartFailed:
        try:
            return faulty_host.start(data, migrate=True)
        except StartFailed as failure:
            return failure

    return Left(lay_out, start, promises)


some_or_all = pytest.mark.parametrize("every", [151, pytest.param(1, marks=pytest.mark.slow)])


@some_or_all
@faults("EIO", slow=["torn"])
def test_a_fault_in_a_step_of_a_start_or_stop(disk, left, action, value, every):
    """Services start, or say at last in one line why not; the next start has everything."""
    for _ in _each_step(disk, action, value, every):
        left.lay_out()
        started = left.start()
        if isinstance(started, StartFailed):
            assert (started.code, started.text.splitlines()[-1][:7]) == (1, "kvbank:"), started
        else:
            started.stop()
        disk.clear()
        _has_everything(left)


@some_or_all
def test_a_kill_in_a_step_of_a_start_or_stop(disk, left, every):
    for _ in _each_step(disk, Action.TORN_KILL, every=every):
        left.lay_out()
        started = left.start()
        if isinstance(started, StartFailed):
            assert started.code == -9, started
        else:
            started.stop()
        disk.clear()
        _has_everything(left)


def _has_everything(left: Left) -> None:
    service = left.start()
    assert isinstance(service, Service), service
    _check(service.address, copy.deepcopy(left.promises))
    service.kill()


def test_a_flipped_bit_on_its_way_from_the_disk_is_never_served(disk, faulty_host, data):
    service = faulty_host.start(data)
    promises = _fill(service.address, chunks=4)
    with kvbank.connect(service.address) as client:
        disk.rule(Action.FLIP, Op.READ, "/payloads/")
        with pytest.raises(kvbank.DataLoss) as refusal:
            client.fetch(BANK, list(promises.acknowledged), reader_digest=READER)
        damaged = int(refusal.value.metadata["chunk_id"])
        found = client.retrieve(BANK, vector_of(bytes(16)), **DIGESTS).chunks
        assert set(found) == set(promises.acknowledged) - {damaged}
        assert not any(differences(chunk) for chunk in found.values())
        assert client.get_bank(BANK).usage.chunks_quarantined == 1


def test_a_read_that_fails_is_no_reason_to_give_a_chunk_up(disk, faulty_host, data):
    service = faulty_host.start(data)
    promises = _fill(service.address, chunks=4)
    with kvbank.connect(service.address) as client:
        disk.rule(Action.FAIL, Op.READ, "/payloads/", repeat=True)
        with pytest.raises(kvbank.Unavailable) as refusal:
            client.fetch(BANK, list(promises.acknowledged), reader_digest=READER)
        assert refusal.value.reason == "STORAGE_ERROR"
        disk.clear()
    _check(service.address, promises)


def test_a_slow_disk_keeps_nobody_waiting_who_needs_no_disk(disk, faulty_host, data):
    service = faulty_host.start(data)
    promises = _fill(service.address, chunks=4)
    rule = disk.rule(Action.SLOW, Op.SYNC, ".tmp", value=3000)
    with Once(service.address) as client, kvbank.connect(service.address) as reader, ThreadPoolExecutor(1) as thread:
        key = new_key(tokens=250)  # a small file is synced later
        writing = thread.submit(client.write, BANK, chunk_of(key))
        while not rule.fired:
            assert not writing.done()
        for _ in range(20):
            assert reader.retrieve(BANK, vector_of(key), **DIGESTS).chunks.keys() == promises.acknowledged.keys()
        assert not writing.done()
        (ack,) = writing.result()
    promises.acknowledged[ack.chunk_id] = key
    _check(service.address, promises)
