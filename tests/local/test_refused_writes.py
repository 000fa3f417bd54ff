"""What a write leaves on the disk that is refused when its object is stored already: nothing."""

from dataclasses import replace

from memory_service.domain.limits import Pauses
from memory_service.domain.model import Quota
from memory_service.storage.base import Written
from tests.support.engines import opened
from tests.support.store import new_chunk, reason
from tests.support.waiting import wait_until
from tests.support.writing import PAYLOAD, admitted, begun, made_bank, writer


def payloads(data):
    """Return the ids of the chunks that have a file."""
    return sorted(int(path.stem) for path in (data / "payloads").glob("*/*/*"))


def test_the_object_of_a_write_that_the_quota_refuses_goes(data):
    with opened(data) as engine:
        bank, writes = made_bank(engine, quota=Quota(chunks=1)), writer(engine)
        first, second = (admitted(writes, bank, replace(new_chunk(number), payload=PAYLOAD)) for number in (1, 2))
        assert begun(writes, first).result(60).chunk_id == first.chunk_id
        assert reason(lambda: begun(writes, second).result(60)) == "QUOTA_EXCEEDED"
        wait_until(lambda: payloads(data) == [first.chunk_id])


def test_the_object_of_a_write_that_turns_out_to_be_a_repeated_one_goes(data):
    # Its key is not known when it looks, and is when its row is committed.
    with opened(data) as engine:
        bank = made_bank(engine)
        chunk, plain = replace(new_chunk(1), payload=PAYLOAD), writer(engine)
        first = admitted(plain, bank, chunk)
        late = writer(engine, Pauses(at={"object stored": lambda: begun(plain, first).result(60)}))
        answer = begun(late, admitted(late, bank, chunk)).result(60)
        assert answer == Written(chunk.key, first.chunk_id, replayed=True)
        wait_until(lambda: payloads(data) == [first.chunk_id])
