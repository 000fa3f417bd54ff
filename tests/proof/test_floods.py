"""No request takes much more memory than it has bytes, keeps others waiting, or stays: any field of any method.

Every field of the contract that could be sent in millions is, as tiny values in a message that gRPC takes. Times are
bounded widely, because the machine may be busy: what they guard against took seconds for a message of this size.
"""

import gzip
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

import kvbank
from kvbank.v1 import service_pb2 as pb
from kvbank.wire.stub import make_stub
from tests.proof.cost import cost_of
from tests.proof.floods import DIRECT, METHODS, MIB, SIZES, all_floods, flood, floods, send, send_directly
from tests.proof.fuzz import TEMPLATES, know
from tests.proof.once import reason_of
from tests.support.refusals import error_of
from tests.support.service_process import Service, ServiceHost

# What took gigabytes.
SAMPLE = (
    ("GetStats", "banks", "large"),
    ("DeleteChunks", "chunk_ids packed", "large"),
    ("ListChunks", "filter.metadata", "large"),
    ("ListChunks", "filter.metadata", "many"),
    ("WriteChunks", "header.chunk.payload.tensors", "large"),
    ("UpdateChunk", "metadata", "many"),
    ("AppendTurns", "turns.items", "large"),
    ("Retrieve", "banks", "larger"),
)


@pytest.fixture(scope="module")
def service(host: ServiceHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = host.start(tmp_path_factory.mktemp("floods") / "data", durability="os", same_host=True)
    yield made
    assert made.stop() == 0


@pytest.fixture(scope="module")
def socket_path(service: Service) -> str:
    with grpc.insecure_channel(service.address) as channel:
        shared = make_stub(channel).GetServerInfo(pb.GetServerInfoRequest()).same_host
    return str(Path(shared.root, shared.socket))


@pytest.fixture(scope="module")
def sending(service: Service) -> Iterator[Callable[[str, bytes], None]]:
    """Send bytes to a method, and let it end in one of our errors, or well."""
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(service.address, options=options) as channel:

        def once(method: str, data: bytes) -> None:
            refusal = None
            try:
                send(channel, method, data, timeout=100)
            except grpc.RpcError as error:
                refusal = error
            assert refusal is None or reason_of(refusal) not in ("", "INTERNAL"), refusal

        yield once


def test_every_field_is_flooded_once() -> None:
    """Also those of filters, which hold filters."""
    paths = [(method, path) for method, path, _ in all_floods(100)]
    assert len(paths) == len(set(paths))
    assert {("ListChunks", "filter.any_of.pinned"), ("KeepWindow", "header.stamp")} <= set(paths)


@pytest.mark.parametrize(("method", "path", "size"), SAMPLE)
def test_a_request_is_bounded_before_it_is_decoded(service, sending, method, path, size):
    data = flood(METHODS[method].input_type, path, SIZES[size])
    cost = cost_of(service, lambda: sending(method, data))
    assert cost.within(len(data)), cost


def test_what_was_refused_does_not_stay(service, sending):
    """Five calls of ten million headers; each was kept by the error that refused it."""
    data = flood(METHODS["WriteChunks"].input_type, "headers.headers", 20 * MIB)
    cost = cost_of(service, lambda: sending("WriteChunks", data), times=5)
    assert cost.within(len(data)), cost
    assert service.resident_bytes() < 300 * MIB


def test_a_refused_call_keeps_nothing_that_it_held(service, sending):
    """Names of banks with 3 MiB are looked up and not found: such a message was decoded, and went through all
    layers."""
    data = flood(METHODS["GetBank"].input_type, "name", 3 * MIB)
    sending("GetBank", data)
    before = service.resident_bytes()
    for _ in range(25):
        sending("GetBank", data)
    assert service.resident_bytes() - before < 64 * MIB


def test_a_compressed_request_is_refused(service):
    """3 KiB would be 3 MiB. gRPC itself says so, before it looks what is in it."""
    data = flood(METHODS["WriteChunks"].input_type, "headers.headers", 3 * MIB)
    assert len(gzip.compress(data)) < MIB // 100

    def compressed() -> None:
        with grpc.insecure_channel(service.address) as channel, pytest.raises(grpc.RpcError) as refusal:
            send(channel, "WriteChunks", data, compression=grpc.Compression.Gzip, timeout=60)
        assert refusal.value.code() == grpc.StatusCode.UNIMPLEMENTED

    assert cost_of(service, compressed).peak < 2 * MIB


def test_a_direct_call_is_bounded_before_it_is_decoded(service, socket_path):
    data = flood(DIRECT, "retrieve.retrieve.banks", SIZES["larger"])
    answers = []
    cost = cost_of(service, lambda: answers.append(send_directly(socket_path, data)), times=2)
    assert cost.within(len(data)), cost
    assert [error_of(answer)[1] for answer in answers] == ["TOO_LARGE"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_every_field_of_direct_calls(service, socket_path, size):
    costly = []
    for path, data in floods(DIRECT, SIZES[size]):
        cost = cost_of(service, lambda data=data: send_directly(socket_path, data))
        if not cost.within(len(data)):
            costly.append((path, cost))
    assert costly == []


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_valid_requests(service, sending, method):
    """Behind what makes a request valid, so that its other fields come as far as they can."""
    with kvbank.connect(service.address) as client, grpc.insecure_channel(service.address) as channel:
        valid = next(iter(TEMPLATES[method](random.Random(1), know(client, channel)))).SerializeToString()
    costly = []
    for path, data in floods(METHODS[method].input_type, SIZES["many"]):
        cost = cost_of(service, lambda data=data: sending(method, valid + data))
        if not cost.within(len(data)):
            costly.append((path, cost))
    assert costly == []


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_every_method(service, sending, method, size):
    costly = []
    for path, data in floods(METHODS[method].input_type, SIZES[size]):
        cost = cost_of(service, lambda data=data: sending(method, data))
        if not cost.within(len(data)):
            costly.append((path, cost))
    assert costly == []
    assert service.resident_bytes() < 600 * MIB
