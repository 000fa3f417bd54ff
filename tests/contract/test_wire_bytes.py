"""What chunks take on the disk is counted, shown, bounded, and given back when they go."""

import grpc
import pytest

from kvbank.v1 import service_pb2 as pb
from tests.support.caller import stored_bytes
from tests.support.waiting import wait_until


def test_metadata_that_grow_count(caller, refused):
    caller.create("q", layers=[], quota={"bytes": 800})
    chunk, data = caller.chunk(layers=[])
    (ack,) = caller.write((chunk, data), bank="q")

    def change(metadata):
        caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="q", chunk_id=ack.chunk_id, metadata=metadata))
        chunk.metadata.clear()
        chunk.metadata.update(metadata)
        assert caller.usage("q").bytes == stored_bytes(chunk, data)

    change({"speaker": "a" * 100})
    change({})
    with refused("QUOTA_EXCEEDED", grpc.StatusCode.RESOURCE_EXHAUSTED):
        change({"speaker": "a" * 500})
    assert caller.usage("q").bytes == stored_bytes(chunk, data)
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="q", chunk_ids=[ack.chunk_id]))
    assert caller.usage("q").bytes == 0


@pytest.mark.parametrize("kind", ["FREQUENCY", "REJECT"])
def test_metadata_that_grow_beyond_a_capacity_bring_the_bank_down_or_are_refused(caller, refused, kind):
    caller.create("c", layers=[], capacity={"bytes": 2000}, policy={"kind": f"POLICY_KIND_{kind}"})
    ids = [caller.add(bank="c", layers=[]) for _ in range(6)]
    request = pb.UpdateChunkRequest(bank="c", chunk_id=ids[-1], metadata={"speaker": "a" * 500})
    if kind == "REJECT":
        with refused("BANK_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED):
            caller.stub.UpdateChunk(request)
        assert caller.ids("c") == ids
        return
    caller.stub.UpdateChunk(request)
    wait_until(lambda: caller.usage("c").bytes <= 2000)
    assert ids[-1] in caller.ids("c")
    assert caller.ids("c") != ids
