import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kvbank.v1 import bank_pb2 as _bank_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PayloadKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAYLOAD_KIND_UNSPECIFIED: _ClassVar[PayloadKind]
    PAYLOAD_KIND_LAYER_KV: _ClassVar[PayloadKind]
    PAYLOAD_KIND_SOFT_TOKENS: _ClassVar[PayloadKind]
PAYLOAD_KIND_UNSPECIFIED: PayloadKind
PAYLOAD_KIND_LAYER_KV: PayloadKind
PAYLOAD_KIND_SOFT_TOKENS: PayloadKind

class TensorDescriptor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "offset", "length", "checksum")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: _bank_pb2.DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    length: int
    checksum: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[_bank_pb2.DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Producer(_message.Message):
    __slots__ = ("method", "version", "context", "adapter_digest", "measured_loss")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MEASURED_LOSS_FIELD_NUMBER: _ClassVar[int]
    method: str
    version: str
    context: str
    adapter_digest: str
    measured_loss: float
    def __init__(self, method: _Optional[str] = ..., version: _Optional[str] = ..., context: _Optional[str] = ..., adapter_digest: _Optional[str] = ..., measured_loss: _Optional[float] = ...) -> None: ...

class PayloadDescriptor(_message.Message):
    __slots__ = ("kind", "tensors", "producer", "seed", "checksum", "file_length", "header_length", "header_checksum")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    FILE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    HEADER_LENGTH_FIELD_NUMBER: _ClassVar[int]
    HEADER_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    kind: PayloadKind
    tensors: _containers.RepeatedCompositeFieldContainer[TensorDescriptor]
    producer: Producer
    seed: int
    checksum: int
    file_length: int
    header_length: int
    header_checksum: int
    def __init__(self, kind: _Optional[_Union[PayloadKind, str]] = ..., tensors: _Optional[_Iterable[_Union[TensorDescriptor, _Mapping]]] = ..., producer: _Optional[_Union[Producer, _Mapping]] = ..., seed: _Optional[int] = ..., checksum: _Optional[int] = ..., file_length: _Optional[int] = ..., header_length: _Optional[int] = ..., header_checksum: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("chunk_id", "bank", "idempotency_key", "start", "original_length", "stored_length", "token_ids", "text", "metadata", "payload", "embedding", "create_time", "retrieval_count", "last_retrieve_time", "pinned", "expiry", "expire_time", "typed_metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class TypedMetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _bank_pb2.Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_bank_pb2.Scalar, _Mapping]] = ...) -> None: ...
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    BANK_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_LENGTH_FIELD_NUMBER: _ClassVar[int]
    STORED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_RETRIEVE_TIME_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    EXPIRY_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    TYPED_METADATA_FIELD_NUMBER: _ClassVar[int]
    chunk_id: int
    bank: str
    idempotency_key: bytes
    start: int
    original_length: int
    stored_length: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    metadata: _containers.ScalarMap[str, str]
    payload: PayloadDescriptor
    embedding: bytes
    create_time: _timestamp_pb2.Timestamp
    retrieval_count: int
    last_retrieve_time: _timestamp_pb2.Timestamp
    pinned: bool
    expiry: _bank_pb2.Expiry
    expire_time: _timestamp_pb2.Timestamp
    typed_metadata: _containers.MessageMap[str, _bank_pb2.Scalar]
    def __init__(self, chunk_id: _Optional[int] = ..., bank: _Optional[str] = ..., idempotency_key: _Optional[bytes] = ..., start: _Optional[int] = ..., original_length: _Optional[int] = ..., stored_length: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., payload: _Optional[_Union[PayloadDescriptor, _Mapping]] = ..., embedding: _Optional[bytes] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., retrieval_count: _Optional[int] = ..., last_retrieve_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pinned: _Optional[bool] = ..., expiry: _Optional[_Union[_bank_pb2.Expiry, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., typed_metadata: _Optional[_Mapping[str, _bank_pb2.Scalar]] = ...) -> None: ...
