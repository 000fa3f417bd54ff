from kvbank.v1 import service_pb2 as _service_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DirectRequest(_message.Message):
    __slots__ = ("retrieve", "fetch", "request_id")
    RETRIEVE_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    retrieve: _service_pb2.RetrieveFilesRequest
    fetch: _service_pb2.FetchFilesRequest
    request_id: str
    def __init__(self, retrieve: _Optional[_Union[_service_pb2.RetrieveFilesRequest, _Mapping]] = ..., fetch: _Optional[_Union[_service_pb2.FetchFilesRequest, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class DirectResponse(_message.Message):
    __slots__ = ("retrieve", "fetch", "error")
    RETRIEVE_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    retrieve: _service_pb2.RetrieveFilesResponse
    fetch: _service_pb2.FetchFilesResponse
    error: bytes
    def __init__(self, retrieve: _Optional[_Union[_service_pb2.RetrieveFilesResponse, _Mapping]] = ..., fetch: _Optional[_Union[_service_pb2.FetchFilesResponse, _Mapping]] = ..., error: _Optional[bytes] = ...) -> None: ...
