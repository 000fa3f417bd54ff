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


def test_a_bank_takes_the_place_of_another(serving):
    """Keep chunks and specs of the new bank, with name and settings of the old one, which is gone."""
    caller = serving()
    caller.create(capacity={"chunks": 9}, policy={"kind": bank_pb2.POLICY_KIND_LRU}, metadata={"a": "b"})
    caller.add(text="old")
    new = caller.create("b~new", metadata={"made": "beside"}, embedding={"embedder_digest": "other", "dimension": 2})
    chunk, data = caller.chunk(vector=(1, 0), text="new")
    frames = list(caller.frames(chunk, data))
    frames[0].header.bank, frames[0].header.embedder_digest = "b~new", "other"
    (ack,) = caller.stub.WriteChunks(iter(frames))
    old = caller.stub.GetBank(pb.GetBankRequest(name="b")).bank
    request = pb.ReplaceBankRequest(name="b", uid=old.uid, by="b~new", by_uid=new.uid, metadata={"c": "d"})
    request.chunks, request.chunks_written = 1, 1
    bank = caller.stub.ReplaceBank(request).bank
    assert (bank.name, bank.uid, bank.embedding.embedder_digest, bank.metadata) == ("b", new.uid, "other", {"c": "d"})
    assert (bank.capacity, bank.policy.kind, bank.usage.chunks) == (old.capacity, bank_pb2.POLICY_KIND_LRU, 1)
    # The answer may be lost: asked for again, the call is answered as it was, also after a restart.
    for restarted in (False, True):
        asked = serving() if restarted else caller
        assert asked.stub.ReplaceBank(request).bank == bank
        assert [found.name for found in asked.stub.ListBanks(pb.ListBanksRequest()).banks] == ["b"]
        assert asked.get(ack.chunk_id).text == "new"
        header, found = asked.retrieve((1, 0), embedder_digest="other")
        assert ([hit.chunk_id for hit in header.queries[0].hits], found) == ([ack.chunk_id], {ack.chunk_id: data})


def test_a_bank_that_has_changed_is_not_replaced(caller, refused):
    caller.create()
    first = caller.add()
    new = caller.create("new")
    old = caller.stub.GetBank(pb.GetBankRequest(name="b")).bank
    seen = {"name": "b", "uid": old.uid, "chunks": 1, "chunks_written": 1, "by": "new", "by_uid": new.uid}
    caller.add()
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[first]))
    for wrong, reason in (
        ({}, "BANK_CHANGED"),  # as many chunks as were seen, and not the same
        ({"chunks_written": 2, "chunks": 2}, "BANK_CHANGED"),
        ({"chunks_written": 2, "uid": new.uid}, "BANK_CHANGED"),
        ({"chunks_written": 2, "by_uid": old.uid[::-1]}, "BANK_CHANGED"),
        ({"name": "no"}, "BANK_NOT_FOUND"),
        ({"chunks_written": 2, "by": "no"}, "BANK_NOT_FOUND"),
        ({"chunks_written": 2, "metadata": {"a": "b\0"}}, "INVALID_FIELD"),
    ):
        codes = {"BANK_NOT_FOUND": "NOT_FOUND", "INVALID_FIELD": "INVALID_ARGUMENT"}
        with refused(reason, grpc.StatusCode[codes.get(reason, "FAILED_PRECONDITION")]):
            caller.stub.ReplaceBank(pb.ReplaceBankRequest(**(seen | wrong)))
    assert len(caller.ids()) == 1
    assert caller.stub.ReplaceBank(pb.ReplaceBankRequest(**(seen | {"chunks_written": 2}))).bank.uid == new.uid
    assert caller.ids() == []


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
