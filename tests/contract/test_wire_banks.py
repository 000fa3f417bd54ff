"""How banks are made, found and changed, and how they survive a restart."""

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb


def test_create_fills_in_defaults_and_is_repeatable(caller):
    bank = caller.create("c", capacity={"tokens": 100}, metadata={"a": "b"})
    assert (bank.policy.kind, bank.policy.lower, bank.policy.upper, bank.policy.target) == (1, 10, 90, 50)
    assert (bank.capacity.tokens, bank.metadata) == (100, {"a": "b"})
    assert len(bank.uid) == 16
    assert caller.create("c").uid == bank.uid
    assert caller.stub.GetBank(pb.GetBankRequest(name="c")).bank == bank


def test_list_pages_by_name(caller):
    for name in ("d", "a", "c"):
        caller.create(name)
    first = caller.stub.ListBanks(pb.ListBanksRequest(page_size=3))
    second = caller.stub.ListBanks(pb.ListBanksRequest(page_size=3, page_token=first.next_page_token))
    assert [bank.name for bank in [*first.banks, *second.banks]] == ["a", "b", "c", "d"]
    assert second.next_page_token == ""


def test_update_changes_what_the_mask_names(caller):
    caller.create("c", capacity={"chunks": 5}, metadata={"a": "b"})
    bank = bank_pb2.Bank(name="c", policy={"kind": bank_pb2.POLICY_KIND_REJECT}, metadata={"x": "y"})
    request = pb.UpdateBankRequest(bank=bank, update_mask={"paths": ["policy", "capacity"]})
    changed = caller.stub.UpdateBank(request).bank
    assert (changed.policy.kind, changed.metadata) == (bank_pb2.POLICY_KIND_REJECT, {"a": "b"})
    assert changed.capacity.WhichOneof("limit") is None


def test_banks_survive_a_restart(serving):
    caller = serving()
    caller.create()
    caller.add()
    bank = caller.stub.GetBank(pb.GetBankRequest(name="b")).bank
    store_id = caller.stub.GetServerInfo(pb.GetServerInfoRequest()).store_id
    caller = serving()
    assert caller.stub.GetBank(pb.GetBankRequest(name="b")).bank == bank
    assert caller.stub.GetServerInfo(pb.GetServerInfoRequest()).store_id == store_id
    assert len(caller.retrieve()[1]) == 1


def test_server_info(caller):
    info = caller.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.version, info.durability) == ("0.1.0", "os")
    assert info.max_message_bytes == 2 * info.max_unacknowledged_bytes == 64 << 20


def test_reflection_is_off_unless_asked_for(serving):
    def services(caller):
        stub = reflection_pb2_grpc.ServerReflectionStub(caller.channel)
        (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        return {service.name for service in answer.list_services_response.service}

    with pytest.raises(grpc.RpcError) as caught:
        services(serving())
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert {"kvbank.v1.MemoryService", "grpc.health.v1.Health"} <= services(serving(reflection=True))
