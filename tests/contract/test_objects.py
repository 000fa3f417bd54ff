"""What the objects of every engine promise, asked at the protocol: they are durable and whole or not there, checked
when they are opened, deleted without a trace, and told from a place that is missing."""

import secrets

import pytest

from memory_service.domain.model import Bank, Capacity, EmbeddingSpec, KvSpec, Payload, Policy, Producer, Tensor
from memory_service.domain.payload import checksums_of, seed
from memory_service.storage.base import DamagedError, NotThereError, Objects
from memory_service.storage.verify import OpenFiles, VerifiedPayload

KV = KvSpec("reader", (0,), 1, 4, "fp16")
DATA = bytes(range(40))
PAYLOAD = Payload(
    (
        Tensor("k.0", "fp16", (1, 2, 4), 0, 16, 0),
        Tensor("v.0", "fp16", (1, 2, 4), 16, 16, 0),
        Tensor("pos.0", "int32", (2,), 32, 8, 0),
    ),
    Producer(),
)


@pytest.fixture
def objects(engine) -> Objects:
    return engine.objects


@pytest.fixture
def bank(engine) -> Bank:
    return engine.store.create_bank(Bank("b", KV, EmbeddingSpec("e", 4), Capacity("chunks", 9), Policy(), {}))[0]


def no_copy(_checksums):
    return {}


def read(objects, bank, chunk_id, payload):
    source = objects.open(bank.uid, chunk_id, payload)
    try:
        room = bytearray(payload.length)
        assert source.read_at(memoryview(room), payload.tensors[0].offset) == payload.length
        return bytes(room)
    finally:
        source.close()
        source.close()


def test_what_is_put_is_read_with_offsets_and_checksums_of_its_owner(objects, bank):
    payload = objects.put(bank.uid, 7, PAYLOAD, DATA, no_copy)
    assert read(objects, bank, 7, payload) == DATA
    assert payload.seed == seed(bank.uid, 7)
    assert [tensor.checksum for tensor in payload.tensors] == checksums_of(PAYLOAD.tensors, payload.seed, DATA)
    begin = payload.header_length
    assert [tensor.offset for tensor in payload.tensors] == [begin, begin + 16, begin + 32]
    assert payload.file_length == begin + 40


def test_the_same_bytes_of_two_chunks_have_different_checksums(objects, bank):
    first, second = (objects.put(bank.uid, chunk_id, PAYLOAD, DATA, no_copy) for chunk_id in (1, 2))
    assert first.checksum != second.checksum
    assert first.header_checksum != second.header_checksum


def test_the_copy_is_asked_for_with_the_stored_checksums(objects, bank):
    asked = []
    payload = objects.put(bank.uid, 7, PAYLOAD, DATA, lambda checksums: asked.append(checksums) or {"text": "x"})
    assert asked == [[tensor.checksum for tensor in payload.tensors]]


def test_an_object_that_is_open_is_read_to_its_end_after_it_was_deleted(objects, bank):
    payload = objects.put(bank.uid, 7, PAYLOAD, DATA, no_copy)
    source = objects.open(bank.uid, 7, payload)
    objects.delete(bank.uid, [7, 8])
    room = bytearray(40)
    assert source.read_at(memoryview(room), payload.tensors[0].offset) == 40
    assert room == DATA
    source.close()
    with pytest.raises(FileNotFoundError):
        objects.open(bank.uid, 7, payload)


def test_a_read_behind_the_end_says_how_much_there_was(objects, bank):
    payload = objects.put(bank.uid, 7, PAYLOAD, DATA, no_copy)
    source = objects.open(bank.uid, 7, payload)
    assert source.read_at(memoryview(bytearray(9)), payload.file_length - 3) == 3
    assert source.read_at(memoryview(bytearray(9)), payload.file_length) == 0
    source.close()


def test_an_object_of_another_descriptor_is_damaged(objects, bank):
    objects.put(bank.uid, 7, PAYLOAD, DATA, no_copy)
    other = objects.put(bank.uid, 8, PAYLOAD, DATA, no_copy)
    with pytest.raises(DamagedError):
        objects.open(bank.uid, 7, other)


def test_a_verified_payload_hands_on_no_tensor_of_other_bytes(objects, bank):
    payload = objects.put(bank.uid, 7, PAYLOAD, DATA, no_copy)
    for most in (1, 0):  # held open, and opened for each piece
        reader = VerifiedPayload(lambda: objects.open(bank.uid, 7, payload), payload, OpenFiles(most))
        room, got = memoryview(bytearray(11)), b""
        while count := reader.fill(room):
            got += bytes(room[:count])
        assert got == DATA
        reader.close()
    wrong = Payload((PAYLOAD.tensors[0],), Producer())
    stored = objects.put(bank.uid, 8, wrong, DATA[:16], no_copy)
    tensor = stored.tensors[0]
    changed = Payload((Tensor(*list(vars_of(tensor))[:-1], tensor.checksum ^ 1),), Producer(), **sizes_of(stored))
    reader = VerifiedPayload(lambda: objects.open(bank.uid, 8, stored), changed, OpenFiles(1))
    with pytest.raises(DamagedError, match=r"tensor k\.0 does not match"):
        reader.fill(memoryview(bytearray(64)))
    reader.close()


def vars_of(tensor):
    return (getattr(tensor, name) for name in tensor.__slots__)


def sizes_of(payload):
    return {name: getattr(payload, name) for name in ("seed", "file_length", "header_length", "header_checksum")}


def test_the_place_of_a_bank_that_is_not_there_takes_nothing(engine, objects, bank):
    assert objects.there(bank.uid)
    stranger = secrets.token_hex(8)
    assert not objects.there(stranger)
    with pytest.raises(NotThereError):
        objects.put(stranger, 1, PAYLOAD, DATA, no_copy)


def test_a_put_that_fails_leaves_nothing(objects, bank):
    def fail(_checksums):
        raise RuntimeError("no copy")

    with pytest.raises(RuntimeError):
        objects.put(bank.uid, 7, PAYLOAD, DATA, fail)
    payload = objects.put(bank.uid, 8, PAYLOAD, DATA, no_copy)
    with pytest.raises(FileNotFoundError):
        objects.open(bank.uid, 7, payload)


def test_the_path_of_an_object_is_told_or_there_is_none(objects, bank):
    objects.put(bank.uid, 7, PAYLOAD, DATA, no_copy)
    path = objects.path(bank.uid, 7)
    assert path is None or (objects.staging.parent / path).is_file()
