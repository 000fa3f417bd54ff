import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_BF16: _ClassVar[DataType]
    DATA_TYPE_FP16: _ClassVar[DataType]
    DATA_TYPE_FP32: _ClassVar[DataType]
    DATA_TYPE_INT32: _ClassVar[DataType]

class Metric(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    METRIC_UNSPECIFIED: _ClassVar[Metric]
    METRIC_INNER_PRODUCT: _ClassVar[Metric]

class PolicyKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLICY_KIND_UNSPECIFIED: _ClassVar[PolicyKind]
    POLICY_KIND_FREQUENCY: _ClassVar[PolicyKind]
    POLICY_KIND_RECENCY_HALF: _ClassVar[PolicyKind]
    POLICY_KIND_REJECT: _ClassVar[PolicyKind]
    POLICY_KIND_LRU: _ClassVar[PolicyKind]

class IndexKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INDEX_KIND_UNSPECIFIED: _ClassVar[IndexKind]
    INDEX_KIND_EXACT: _ClassVar[IndexKind]
    INDEX_KIND_IVF: _ClassVar[IndexKind]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_BF16: DataType
DATA_TYPE_FP16: DataType
DATA_TYPE_FP32: DataType
DATA_TYPE_INT32: DataType
METRIC_UNSPECIFIED: Metric
METRIC_INNER_PRODUCT: Metric
POLICY_KIND_UNSPECIFIED: PolicyKind
POLICY_KIND_FREQUENCY: PolicyKind
POLICY_KIND_RECENCY_HALF: PolicyKind
POLICY_KIND_REJECT: PolicyKind
POLICY_KIND_LRU: PolicyKind
INDEX_KIND_UNSPECIFIED: IndexKind
INDEX_KIND_EXACT: IndexKind
INDEX_KIND_IVF: IndexKind

class Scalar(_message.Message):
    __slots__ = ("text", "integer", "real", "flag")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    text: str
    integer: int
    real: float
    flag: bool
    def __init__(self, text: _Optional[str] = ..., integer: _Optional[int] = ..., real: _Optional[float] = ..., flag: _Optional[bool] = ...) -> None: ...

class KvSpec(_message.Message):
    __slots__ = ("reader_digest", "reader_parts", "layers", "kv_heads", "head_dim", "dtype", "hidden_size")
    class ReaderPartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    READER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    READER_PARTS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    reader_digest: str
    reader_parts: _containers.ScalarMap[str, str]
    layers: _containers.RepeatedScalarFieldContainer[int]
    kv_heads: int
    head_dim: int
    dtype: DataType
    hidden_size: int
    def __init__(self, reader_digest: _Optional[str] = ..., reader_parts: _Optional[_Mapping[str, str]] = ..., layers: _Optional[_Iterable[int]] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[_Union[DataType, str]] = ..., hidden_size: _Optional[int] = ...) -> None: ...

class EmbeddingSpec(_message.Message):
    __slots__ = ("embedder_digest", "dimension", "metric")
    EMBEDDER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    embedder_digest: str
    dimension: int
    metric: Metric
    def __init__(self, embedder_digest: _Optional[str] = ..., dimension: _Optional[int] = ..., metric: _Optional[_Union[Metric, str]] = ...) -> None: ...

class Capacity(_message.Message):
    __slots__ = ("chunks", "tokens", "bytes")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    tokens: int
    bytes: int
    def __init__(self, chunks: _Optional[int] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class EvictionPolicy(_message.Message):
    __slots__ = ("kind", "lower", "upper", "target")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LOWER_FIELD_NUMBER: _ClassVar[int]
    UPPER_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    kind: PolicyKind
    lower: int
    upper: int
    target: int
    def __init__(self, kind: _Optional[_Union[PolicyKind, str]] = ..., lower: _Optional[int] = ..., upper: _Optional[int] = ..., target: _Optional[int] = ...) -> None: ...

class Quota(_message.Message):
    __slots__ = ("chunks", "tokens", "bytes")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    tokens: int
    bytes: int
    def __init__(self, chunks: _Optional[int] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Expiry(_message.Message):
    __slots__ = ("ttl", "renew")
    TTL_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    ttl: _duration_pb2.Duration
    renew: bool
    def __init__(self, ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., renew: _Optional[bool] = ...) -> None: ...

class BankUsage(_message.Message):
    __slots__ = ("chunks", "tokens", "bytes", "chunks_written", "chunks_evicted", "chunks_deleted", "chunks_quarantined", "chunks_expired")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_EVICTED_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_DELETED_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    tokens: int
    bytes: int
    chunks_written: int
    chunks_evicted: int
    chunks_deleted: int
    chunks_quarantined: int
    chunks_expired: int
    def __init__(self, chunks: _Optional[int] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., chunks_written: _Optional[int] = ..., chunks_evicted: _Optional[int] = ..., chunks_deleted: _Optional[int] = ..., chunks_quarantined: _Optional[int] = ..., chunks_expired: _Optional[int] = ...) -> None: ...

class Bank(_message.Message):
    __slots__ = ("name", "uid", "kv", "embedding", "capacity", "policy", "metadata", "create_time", "usage", "quota", "expiry", "index", "typed_metadata")
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
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    EXPIRY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TYPED_METADATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    uid: str
    kv: KvSpec
    embedding: EmbeddingSpec
    capacity: Capacity
    policy: EvictionPolicy
    metadata: _containers.ScalarMap[str, str]
    create_time: _timestamp_pb2.Timestamp
    usage: BankUsage
    quota: Quota
    expiry: Expiry
    index: IndexKind
    typed_metadata: _containers.MessageMap[str, Scalar]
    def __init__(self, name: _Optional[str] = ..., uid: _Optional[str] = ..., kv: _Optional[_Union[KvSpec, _Mapping]] = ..., embedding: _Optional[_Union[EmbeddingSpec, _Mapping]] = ..., capacity: _Optional[_Union[Capacity, _Mapping]] = ..., policy: _Optional[_Union[EvictionPolicy, _Mapping]] = ..., metadata: _Optional[_Mapping[str, str]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., usage: _Optional[_Union[BankUsage, _Mapping]] = ..., quota: _Optional[_Union[Quota, _Mapping]] = ..., expiry: _Optional[_Union[Expiry, _Mapping]] = ..., index: _Optional[_Union[IndexKind, str]] = ..., typed_metadata: _Optional[_Mapping[str, Scalar]] = ...) -> None: ...
