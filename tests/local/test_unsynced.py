"""A small payload file is acknowledged when its bytes are in the records, and synced a moment later: what a power cut
has taken of the file is made again by the next start, and the chunk is not taken for damaged before that."""

import shutil
import sqlite3
from contextlib import closing

import grpc
import pytest

import kvbank
from kvbank.v1 import service_pb2 as pb
from memory_service.care.backup import backup
from memory_service.care.check import check
from memory_service.care.repair import repair
from memory_service.care.restore import restore
from memory_service.domain.limits import Limits
from tests.support.caller import READER
from tests.support.command import application, run
from tests.support.forgettable import Talk, found_in
from tests.support.synced import skip_where_files_are_synced_one_by_one, unsynced, wait_until_synced
from tests.support.waiting import wait_until

# Files are synced when the service stops, and not before.
LATE = Limits(sync_s=3600.0)


@pytest.fixture(autouse=True)
def whole_disk(tmp_path) -> None:
    skip_where_files_are_synced_one_by_one(tmp_path)


def change(data, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        database.execute(statement, values)
        database.commit()


@pytest.fixture
def written(serving, data, tmp_path):
    """Write three chunks, and return the folder as it is before anything is synced, and what was written, by id."""
    caller = serving(durability="fsync", limits=LATE)
    caller.create()
    chunks = [caller.chunk(vector) for vector in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))]
    ids = [ack.chunk_id for ack in caller.write(*chunks)]
    left = shutil.copytree(data, tmp_path / "left", ignore=shutil.ignore_patterns("kvbank.lock", "*.nonce", "*.sock"))
    serving.stop()
    return left, {chunk_id: tensors for chunk_id, (_, tensors) in zip(ids, chunks, strict=True)}


def lose(path) -> None:
    path.unlink()


def lose_folder(path) -> None:
    shutil.rmtree(path.parent)


def tear(path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def leave_zeros(path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def keep(_path) -> None:
    pass


@pytest.fixture(params=[lose, lose_folder, tear, leave_zeros, keep])
def cut(request, written):
    """Take from each file what a power cut may take."""
    left, chunks = written
    for chunk_id in chunks:
        (path,) = left.glob(f"payloads/*/*/{chunk_id}.safetensors")
        request.param(path)
    return left, chunks


def test_a_start_makes_the_files_again(cut, serving):
    left, chunks = cut
    assert unsynced(left).keys() == chunks.keys()
    assert serving(data=left).fetch(*chunks) == chunks
    assert unsynced(left) == {}
    serving.stop()
    assert check(left).problems == []


def test_care_goes_by_the_bytes_in_the_records(cut, tmp_path, serving):
    left, chunks = cut
    assert check(left).problems == []
    repaired = repair(left)
    assert (repaired.done, repaired.left) == ([], [])
    assert backup(left, tmp_path / "backup").problems == []
    assert restore(tmp_path / "backup", tmp_path / "restored")[1].problems == []
    assert run(application(), "store", "copy", left, tmp_path / "copied").exit_code == 0
    for place in ("restored", "copied"):
        assert serving(data=tmp_path / place).fetch(*chunks) == chunks


def test_files_are_synced_while_the_service_runs(serving, data):
    caller = serving(durability="fsync", limits=Limits(sync_s=0.01))
    caller.create()
    caller.add()
    wait_until_synced(data)


def test_files_are_synced_when_the_service_stops(written, data):
    assert unsynced(data) == {}


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"m": 400, "original_length": 400, "token_ids": ()}, {"durability": "fsync", "limits": LATE}),
        ({}, {"durability": "fsync", "limits": Limits(sync_s=3600.0, unsynced_bytes=1000)}),
        ({}, {"durability": "os", "limits": LATE}),
    ],
    ids=["a large file", "too many bytes", "nothing is durable"],
)
def test_files_whose_bytes_are_not_in_the_records(serving, data, fields, settings):
    caller = serving(**settings)
    caller.create()
    caller.add(**fields)
    assert unsynced(data) == {}


@pytest.mark.parametrize("how", ["deleted", "evicted", "bank deleted"])
def test_the_bytes_go_with_their_chunk(serving, data, how):
    caller = serving(durability="fsync", limits=LATE)
    caller.create()
    first = caller.add()
    assert list(unsynced(data)) == [first]
    if how == "deleted":
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[first]))
    elif how == "evicted":
        caller.update(capacity={"chunks": 1})
        caller.add()
    else:
        caller.stub.DeleteBank(pb.DeleteBankRequest(name="b"))
    wait_until(lambda: first not in unsynced(data), "the bytes stay in the records")


def test_a_write_that_is_refused_leaves_nothing(serving, data, refused):
    caller = serving(durability="fsync", limits=LATE)
    caller.create()
    chunk = caller.chunk()
    (first,) = caller.write(chunk)
    (again,) = caller.write(chunk)
    assert again.replayed
    other, tensors = caller.chunk(idempotency_key=chunk[0].idempotency_key, text="another")
    with refused("KEY_REUSED", grpc.StatusCode.ALREADY_EXISTS):
        caller.write((other, tensors))
    assert list(unsynced(data)) == [first.chunk_id]


def test_damaged_bytes_do_not_take_the_place_of_a_file(written, serving, caplog):
    left, chunks = written
    change(left, "UPDATE unsynced SET file = zeroblob(length(file))")
    assert serving(data=left).fetch(*chunks) == chunks
    assert caplog.text.count("in the records are damaged") == len(chunks)


def away(data, tmp_path):
    """Take the disk of the bank away, and return where it is."""
    (bank,) = data.glob("payloads/????????????????")
    return bank, bank.rename(tmp_path / "away")


@pytest.mark.parametrize("served", [False, True], ids=["at the next start", "while the service runs"])
def test_files_of_a_disk_that_is_missing_are_made_when_it_is_there(written, serving, tmp_path, served):
    left, chunks = written
    place, disk = away(left, tmp_path)
    for path in disk.glob("*/*.safetensors"):
        lose(path)
    caller = serving(data=left, durability="fsync", limits=LATE)
    assert unsynced(left).keys() == chunks.keys()
    if not served:
        serving.stop()
    disk.rename(place)
    asking = caller if served else serving(data=left)
    with kvbank.connect(serving.server.address) as client:
        found = client.fetch("b", list(chunks), reader_digest=READER)  # asks again where a file was just made
    assert [chunk.chunk_id for chunk in found] == list(chunks)
    assert asking.fetch(*chunks) == chunks


def test_bytes_stay_while_the_disk_of_their_files_is_missing(serving, data, tmp_path):
    caller = serving(durability="fsync", limits=LATE)
    caller.create()
    first = caller.add()
    place, disk = away(data, tmp_path)
    serving.stop()
    assert list(unsynced(data)) == [first]
    disk.rename(place)
    serving().stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[first]))
    assert unsynced(data) == {}


@pytest.mark.parametrize("damage", [lose, tear, leave_zeros])
def test_a_file_is_made_again_that_a_reader_finds_damaged(serving, data, payload_path, damage):
    caller = serving(durability="fsync", limits=LATE)
    caller.create()
    chunk = caller.chunk()
    (ack,) = caller.write(chunk)
    damage(payload_path(ack.chunk_id))
    with kvbank.connect(serving.server.address) as client:
        client.fetch("b", [ack.chunk_id], reader_digest=READER)
    assert caller.fetch(ack.chunk_id) == {ack.chunk_id: chunk[1]}
    assert not list((data / "quarantine").glob("*/*"))


def test_a_damaged_row_is_quarantined_also_where_its_file_is_not_synced(serving, data, refused):
    caller = serving(durability="fsync", limits=LATE)
    caller.create()
    first = caller.add()
    change(data, "UPDATE contents SET text = 'other'")
    with refused("CHECKSUM_MISMATCH", grpc.StatusCode.DATA_LOSS):
        caller.get(first)
    assert unsynced(data) == {}


def test_a_backup_and_its_check_go_by_the_files_of_the_backup(written, tmp_path):
    left, chunks = written
    assert backup(left, tmp_path / "backup").problems == []
    assert unsynced(tmp_path / "backup") == {}
    for path in (tmp_path / "backup").glob("payloads/*/*/*.safetensors"):
        lose(path)
    assert {problem.chunk_id for problem in check(tmp_path / "backup").problems} == chunks.keys()


def test_bytes_that_are_not_synced_are_forgotten_too(serving, data):
    talk = Talk.begun(serving(durability="fsync", limits=LATE), 1, 4)
    assert unsynced(data)
    talk.sessions.forget(talk.session_id)
    assert found_in(data, talk.secrets) == []
