"""Calls that are made once, where the SDK would repeat them, and errors as the service gave them."""

from collections.abc import Callable, Iterable
from types import TracebackType

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import kvbank
from kvbank.v1 import service_pb2 as pb
from kvbank.v1 import service_pb2_grpc
from tests.proof.content import frames_of

SECONDS = 60


class Once:
    """A connection to a service, as a context manager. Errors of its methods: grpc.RpcError."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.stub = service_pb2_grpc.MemoryServiceStub(self.channel)

    def write(
        self, bank: str, *chunks: kvbank.NewChunk, each: Callable[[int], None] = lambda _: None
    ) -> list[pb.WriteChunksResponse]:
        """Write all chunks in one stream; `each` gets the number of acknowledgements at each of them."""
        frames = (frame for chunk in chunks for frame in frames_of(bank, chunk))
        acknowledgements = []
        for acknowledgement in self.stub.WriteChunks(frames, timeout=SECONDS):
            acknowledgements.append(acknowledgement)
            each(len(acknowledgements))
        return acknowledgements

    def delete(self, bank: str, chunk_ids: Iterable[int]) -> int:
        request = pb.DeleteChunksRequest(bank=bank, chunk_ids=chunk_ids)
        return self.stub.DeleteChunks(request, timeout=SECONDS).deleted

    def __enter__(self) -> "Once":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()


def reason_of(error: grpc.RpcError) -> str:
    """Return the reason that our code gave; empty for an error that our code did not make."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    if status is None or not status.details or not status.details[0].Unpack(info) or info.domain != "kvbank":
        return ""
    return info.reason
