"""Clients get the methods of the services here, over a gRPC channel; data frames of the streams pass protobuf by."""

from typing import Any

from kvbank.v1 import access_pb2_grpc, service_pb2, service_pb2_grpc, session_pb2, session_pb2_grpc
from kvbank.wire import frames

_SERVICE, _SESSIONS = "kvbank.v1.MemoryService", "kvbank.v1.SessionService"


def make_stub(channel: Any) -> Any:
    """Return the methods of all services over `channel`, which is a channel of `grpc` or of `grpc.aio`.

    The streams give and take encoded data frames as bytes and views of bytes, see `kvbank.wire.frames`.
    """
    methods: Any = service_pb2_grpc.MemoryServiceStub(channel)  # type: ignore[no-untyped-call]
    vars(methods).update(vars(access_pb2_grpc.AccessServiceStub(channel)))  # type: ignore[no-untyped-call]
    vars(methods).update(vars(session_pb2_grpc.SessionServiceStub(channel)))  # type: ignore[no-untyped-call]
    methods.WriteChunks = channel.stream_stream(
        f"/{_SERVICE}/WriteChunks",
        request_serializer=frames.serializer,
        response_deserializer=service_pb2.WriteChunksResponse.FromString,
    )
    methods.Retrieve = channel.unary_stream(
        f"/{_SERVICE}/Retrieve",
        request_serializer=service_pb2.RetrieveRequest.SerializeToString,
        response_deserializer=frames.deserializer(service_pb2.RetrieveResponse),
    )
    methods.FetchChunks = channel.unary_stream(
        f"/{_SERVICE}/FetchChunks",
        request_serializer=service_pb2.FetchChunksRequest.SerializeToString,
        response_deserializer=frames.deserializer(service_pb2.FetchChunksResponse),
    )
    methods.KeepWindow = channel.stream_stream(
        f"/{_SESSIONS}/KeepWindow",
        request_serializer=frames.serializer,
        response_deserializer=session_pb2.KeepWindowResponse.FromString,
    )
    methods.ReadWindow = channel.unary_stream(
        f"/{_SESSIONS}/ReadWindow",
        request_serializer=session_pb2.ReadWindowRequest.SerializeToString,
        response_deserializer=frames.deserializer(session_pb2.ReadWindowResponse),
    )
    return methods
