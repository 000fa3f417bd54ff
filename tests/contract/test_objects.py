"""What the objects of every engine promise, asked at the protocol: they are durable and whole or not there, checked
when they are opened, deleted without a trace, and told from a place that is missing."""

from collections.abc import Iterator

import pytest

from memory_service.domain.model import Payload, Producer, Tensor
from memory_service.domain.payload import checksums_of, seed
from memory_service.storage.base import DamagedError, NotThereError, Objects
from memory_service.storage.verify import OpenFiles, VerifiedPayload
from tests.support.objects import OBJECTS, Place

DATA = bytes(range(40))
PAYLOAD = Payload(
    (
        Tensor("k.0", "fp16", (1, 2, 4), 0, 16, 0),
        Tensor("v.0", "fp16", (1, 2, 4), 16, 16, 0),
        Tensor("pos.0", "int32", (2,), 32, 8, 0),
    ),
    Producer(),
)


@pytest.fixture(params=OBJECTS)
def place(request, tmp_path) -> Iterator[Place]:
    """Open objects of each kind."""
    kind = OBJECTS[request.param]
    if why := kind.missing():
        pytest.skip(f"objects of the kind {request.param!r} cannot be tested here: {why}")
    with kind.placed(tmp_path) as made:
        yield made


@pytest.fixture
def objects(place) -> Objects:
    return place.objects


@pytest.fixture
def uid(place) -> str:
    return place.uid


def no_copy(_checksums):
    return {}


def read(objects, uid, chunk_id, payload):
    source = objects.open(uid, chunk_id, payload)
    try:
        room = bytearray(payload.length)
        assert source.read_at(memoryview(room), payload.tensors[0].offset) == payload.length
        return bytes(room)
    finally:
        source.close()
        source.close()


def test_what_is_put_is_read_with_offsets_and_checksums_of_its_owner(objects, uid):
    payload = objects.put(uid, 7, PAYLOAD, DATA, no_copy)
    assert read(objects, uid, 7, payload) == DATA
    assert payload.seed == seed(uid, 7)
    assert [tensor.checksum for tensor in payload.tensors] == checksums_of(PAYLOAD.tensors, payload.seed, DATA)
    begin = payload.header_length
    assert [tensor.offset for tensor in payload.tensors] == [begin, begin + 16, begin + 32]
    assert payload.file_length == begin + 40


def test_the_same_bytes_of_two_chunks_have_different_checksums(objects, uid):
    first, second = (objects.put(uid, chunk_id, PAYLOAD, DATA, no_copy) for chunk_id in (1, 2))
    assert first.checksum != second.checksum
    assert first.header_checksum != second.header_checksum


def test_the_copy_is_asked_for_with_the_stored_checksums(objects, uid):
    asked = []
    payload = objects.put(uid, 7, PAYLOAD, DATA, lambda checksums: asked.append(checksums) or {"text": "x"})
    assert asked == [[tensor.checksum for tensor in payload.tensors]]


def test_an_object_that_is_open_is_read_to_its_end_after_it_was_deleted(objects, uid):
    payload = objects.put(uid, 7, PAYLOAD, DATA, no_copy)
    source = objects.open(uid, 7, payload)
    objects.delete(uid, [7, 8])
    room = bytearray(40)
    assert source.read_at(memoryview(room), payload.tensors[0].offset) == 40
    assert room == DATA
    source.close()
    with pytest.raises(FileNotFoundError):
        objects.open(uid, 7, payload)


def test_a_read_behind_the_end_says_how_much_there_was(objects, uid):
    payload = objects.put(uid, 7, PAYLOAD, DATA, no_copy)
    source = objects.open(uid, 7, payload)
    assert source.read_at(memoryview(bytearray(9)), payload.file_length - 3) == 3
    assert source.read_at(memoryview(bytearray(9)), payload.file_length) == 0
    source.close()


def test_an_object_of_another_descriptor_is_damaged(objects, uid):
    objects.put(uid, 7, PAYLOAD, DATA, no_copy)
    other = objects.put(uid, 8, PAYLOAD, DATA, no_copy)
    with pytest.raises(DamagedError):
        objects.open(uid, 7, other)


def test_a_verified_payload_hands_on_no_tensor_of_other_bytes(objects, uid):
    payload = objects.put(uid, 7, PAYLOAD, DATA, no_copy)
    for most in (1, 0):  # held open, and opened for each piece
        reader = VerifiedPayload(lambda: objects.open(uid, 7, payload), payload, OpenFiles(most))
        room, got = memoryview(bytearray(11)), b""
        while count := reader.fill(room):
            got += bytes(room[:count])
        assert got == DATA
        reader.close()
    wrong = Payload((PAYLOAD.tensors[0],), Producer())
    stored = objects.put(uid, 8, wrong, DATA[:16], no_copy)
    tensor = stored.tensors[0]
    changed = Payload((Tensor(*list(vars_of(tensor))[:-1], tensor.checksum ^ 1),), Producer(), **sizes_of(stored))
    reader = VerifiedPayload(lambda: objects.open(uid, 8, stored), changed, OpenFiles(1))
    with pytest.raises(DamagedError, match=r"tensor k\.0 does not match"):
        reader.fill(memoryview(bytearray(64)))
    reader.close()


def vars_of(tensor):
    return (getattr(tensor, name) for name in tensor.__slots__)


def sizes_of(payload):
    return {name: getattr(payload, name) for name in ("seed", "file_length", "header_length", "header_checksum")}


def test_a_place_that_is_not_there_takes_nothing(objects, uid, place):
    assert objects.there(uid)
    lost, other = place.elsewhere
    assert not lost.there(other)
    with pytest.raises(NotThereError):
        lost.put(other, 1, PAYLOAD, DATA, no_copy)


def test_a_put_that_fails_leaves_nothing(objects, uid):
    def fail(_checksums):
        raise RuntimeError("no copy")

    with pytest.raises(RuntimeError):
        objects.put(uid, 7, PAYLOAD, DATA, fail)
    payload = objects.put(uid, 8, PAYLOAD, DATA, no_copy)
    with pytest.raises(FileNotFoundError):
        objects.open(uid, 7, payload)


def test_objects_are_read_as_ever_when_they_were_expected(objects, uid):
    payloads = {n: objects.put(uid, n, PAYLOAD, bytes([n]) * 40, no_copy) for n in (1, 2, 3)}
    objects.expect((uid, n, payload) for n, payload in payloads.items())
    objects.expect([(uid, 9, payloads[1])])
    assert [read(objects, uid, n, payload) for n, payload in payloads.items()] == [bytes([n]) * 40 for n in (1, 2, 3)]
    with pytest.raises(FileNotFoundError):
        objects.open(uid, 9, payloads[1])


def test_the_path_of_an_object_is_told_or_there_is_none(objects, uid):
    objects.put(uid, 7, PAYLOAD, DATA, no_copy)
    path = objects.path(uid, 7)
    assert path is None or (objects.staging.parent / path).is_file()
