"""Malformed requests end in one of our errors, and in nothing else."""

import grpc
import pytest

from tests.proof.fuzz import METHODS, SERVICE, TEMPLATES, fuzz
from tests.proof.once import reason_of

MIB = 1 << 20


def test_every_method_is_fuzzed():
    assert {method.name for method in METHODS} == set(TEMPLATES)


@pytest.mark.parametrize("method", ["GetBank", "Retrieve", "WriteChunks"])
def test_bytes_that_are_no_message_are_refused_with_a_reason(host, tmp_path, method):
    """gRPC would answer UNKNOWN with the text of a Python exception."""
    service = host.start(tmp_path / "data", durability="os")
    with grpc.insecure_channel(service.address) as channel, pytest.raises(grpc.RpcError) as refusal:
        list(channel.stream_stream(f"/{SERVICE.full_name}/{method}")(iter([b"\x0a\xff"])))
    assert (refusal.value.code(), reason_of(refusal.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    service.stop()


@pytest.mark.parametrize("calls", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_malformed_requests(host, tmp_path, calls):
    """Requests come to no end that is a defect; of many, those of each method come as far as its end too."""
    service = host.start(tmp_path / "data", durability="os", same_host=True)
    fuzz(service.address, calls=100, seed=10**6)  # what is loaded at first use is loaded now
    before = service.resident_bytes()
    report = fuzz(service.address, calls=calls, seed=1)
    assert report.bad == []
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= set(report.codes)
    assert calls < 4000 or set(+report.done) == {*TEMPLATES, "direct"}
    assert service.resident_bytes() - before < 100 * MIB
    assert service.stop() == 0
