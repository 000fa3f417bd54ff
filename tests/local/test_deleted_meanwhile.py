"""Writes that meet the deletion of their bank are told that, and leave nothing behind."""

import threading

import grpc

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.care.check import check
from memory_service.storage.local.files.layout import MARK


def test_writers_of_a_bank_that_is_deleted_are_told_that_and_leave_nothing(serving, data, connect):
    """Also of one with a quota, whose usage is asked for after the bank has gone."""
    serving()
    codes, stop = set(), threading.Event()

    def work(number):
        with connect(serving.server.address, first_key=1 + number * 100_000) as caller:
            while not stop.is_set():
                try:
                    caller.write(*(caller.chunk() for _ in range(4)))
                except grpc.RpcError as error:
                    codes.add(error.code())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    with connect(serving.server.address, first_key=10**9) as caller:
        for _ in range(8):
            caller.create(quota=bank_pb2.Quota(chunks=1000))
            caller.write(*(caller.chunk() for _ in range(4)))
            caller.stub.DeleteBank(pb.DeleteBankRequest(name="b"))
    stop.set()
    for thread in threads:
        thread.join()
    serving.stop()
    assert codes <= {grpc.StatusCode.NOT_FOUND}
    assert [path.name for path in (data / "payloads").iterdir()] == [MARK]
    assert check(data).problems == []
