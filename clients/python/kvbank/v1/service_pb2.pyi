import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kvbank.v1 import access_pb2 as _access_pb2
from kvbank.v1 import bank_pb2 as _bank_pb2
from kvbank.v1 import chunk_pb2 as _chunk_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EvictionReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVICTION_REASON_UNSPECIFIED: _ClassVar[EvictionReason]
    EVICTION_REASON_OLDEST: _ClassVar[EvictionReason]
    EVICTION_REASON_LEAST_RETRIEVED: _ClassVar[EvictionReason]
    EVICTION_REASON_OLDEST_HALF: _ClassVar[EvictionReason]
    EVICTION_REASON_ROOM: _ClassVar[EvictionReason]
    EVICTION_REASON_LEAST_RECENT: _ClassVar[EvictionReason]
EVICTION_REASON_UNSPECIFIED: EvictionReason
EVICTION_REASON_OLDEST: EvictionReason
EVICTION_REASON_LEAST_RETRIEVED: EvictionReason
EVICTION_REASON_OLDEST_HALF: EvictionReason
EVICTION_REASON_ROOM: EvictionReason
EVICTION_REASON_LEAST_RECENT: EvictionReason

class GetServerInfoRequest(_message.Message):
    __slots__ = ("challenge",)
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    def __init__(self, challenge: _Optional[bytes] = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "store_id", "durability", "max_message_bytes", "max_chunk_bytes", "max_unacknowledged_bytes", "same_host", "typed_metadata", "alternatives", "max_inline_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_UNACKNOWLEDGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAME_HOST_FIELD_NUMBER: _ClassVar[int]
    TYPED_METADATA_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: str
    store_id: str
    durability: str
    max_message_bytes: int
    max_chunk_bytes: int
    max_unacknowledged_bytes: int
    same_host: SameHost
    typed_metadata: bool
    alternatives: bool
    max_inline_bytes: int
    def __init__(self, version: _Optional[str] = ..., store_id: _Optional[str] = ..., durability: _Optional[str] = ..., max_message_bytes: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., max_unacknowledged_bytes: _Optional[int] = ..., same_host: _Optional[_Union[SameHost, _Mapping]] = ..., typed_metadata: _Optional[bool] = ..., alternatives: _Optional[bool] = ..., max_inline_bytes: _Optional[int] = ...) -> None: ...

class SameHost(_message.Message):
    __slots__ = ("root", "nonce_file", "staging", "socket", "path", "proof")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FILE_FIELD_NUMBER: _ClassVar[int]
    STAGING_FIELD_NUMBER: _ClassVar[int]
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    root: str
    nonce_file: str
    staging: str
    socket: str
    path: bytes
    proof: bytes
    def __init__(self, root: _Optional[str] = ..., nonce_file: _Optional[str] = ..., staging: _Optional[str] = ..., socket: _Optional[str] = ..., path: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class CreateBankRequest(_message.Message):
    __slots__ = ("bank",)
    BANK_FIELD_NUMBER: _ClassVar[int]
    bank: _bank_pb2.Bank
    def __init__(self, bank: _Optional[_Union[_bank_pb2.Bank, _Mapping]] = ...) -> None: ...

class CreateBankResponse(_message.Message):
    __slots__ = ("bank", "created")
    BANK_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    bank: _bank_pb2.Bank
    created: bool
    def __init__(self, bank: _Optional[_Union[_bank_pb2.Bank, _Mapping]] = ..., created: _Optional[bool] = ...) -> None: ...

class GetBankRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetBankResponse(_message.Message):
    __slots__ = ("bank",)
    BANK_FIELD_NUMBER: _ClassVar[int]
    bank: _bank_pb2.Bank
    def __init__(self, bank: _Optional[_Union[_bank_pb2.Bank, _Mapping]] = ...) -> None: ...

class ListBanksRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListBanksResponse(_message.Message):
    __slots__ = ("banks", "next_page_token")
    BANKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    banks: _containers.RepeatedCompositeFieldContainer[_bank_pb2.Bank]
    next_page_token: str
    def __init__(self, banks: _Optional[_Iterable[_Union[_bank_pb2.Bank, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateBankRequest(_message.Message):
    __slots__ = ("bank", "update_mask")
    BANK_FIELD_NUMBER: _ClassVar[int]
    UPDATE_MASK_FIELD_NUMBER: _ClassVar[int]
    bank: _bank_pb2.Bank
    update_mask: _field_mask_pb2.FieldMask
    def __init__(self, bank: _Optional[_Union[_bank_pb2.Bank, _Mapping]] = ..., update_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class UpdateBankResponse(_message.Message):
    __slots__ = ("bank",)
    BANK_FIELD_NUMBER: _ClassVar[int]
    bank: _bank_pb2.Bank
    def __init__(self, bank: _Optional[_Union[_bank_pb2.Bank, _Mapping]] = ...) -> None: ...

class DeleteBankRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteBankResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReplaceBankRequest(_message.Message):
    __slots__ = ("name", "uid", "chunks", "chunks_written", "by", "by_uid", "metadata", "typed_metadata")
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
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    BY_UID_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    TYPED_METADATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    uid: str
    chunks: int
    chunks_written: int
    by: str
    by_uid: str
    metadata: _containers.ScalarMap[str, str]
    typed_metadata: _containers.MessageMap[str, _bank_pb2.Scalar]
    def __init__(self, name: _Optional[str] = ..., uid: _Optional[str] = ..., chunks: _Optional[int] = ..., chunks_written: _Optional[int] = ..., by: _Optional[str] = ..., by_uid: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., typed_metadata: _Optional[_Mapping[str, _bank_pb2.Scalar]] = ...) -> None: ...

class ReplaceBankResponse(_message.Message):
    __slots__ = ("bank",)
    BANK_FIELD_NUMBER: _ClassVar[int]
    bank: _bank_pb2.Bank
    def __init__(self, bank: _Optional[_Union[_bank_pb2.Bank, _Mapping]] = ...) -> None: ...

class ChunkHeader(_message.Message):
    __slots__ = ("bank", "reader_digest", "embedder_digest", "chunk", "staged", "if_absent", "data")
    BANK_FIELD_NUMBER: _ClassVar[int]
    READER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EMBEDDER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    IF_ABSENT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    bank: str
    reader_digest: str
    embedder_digest: str
    chunk: _chunk_pb2.Chunk
    staged: StagedPayload
    if_absent: bool
    data: bytes
    def __init__(self, bank: _Optional[str] = ..., reader_digest: _Optional[str] = ..., embedder_digest: _Optional[str] = ..., chunk: _Optional[_Union[_chunk_pb2.Chunk, _Mapping]] = ..., staged: _Optional[_Union[StagedPayload, _Mapping]] = ..., if_absent: _Optional[bool] = ..., data: _Optional[bytes] = ...) -> None: ...

class StagedPayload(_message.Message):
    __slots__ = ("name", "offset", "nonce", "proof")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    nonce: bytes
    proof: bytes
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class WriteChunksRequest(_message.Message):
    __slots__ = ("header", "data", "headers")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    header: ChunkHeader
    data: bytes
    headers: ChunkHeaders
    def __init__(self, header: _Optional[_Union[ChunkHeader, _Mapping]] = ..., data: _Optional[bytes] = ..., headers: _Optional[_Union[ChunkHeaders, _Mapping]] = ...) -> None: ...

class ChunkHeaders(_message.Message):
    __slots__ = ("headers",)
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    headers: _containers.RepeatedCompositeFieldContainer[ChunkHeader]
    def __init__(self, headers: _Optional[_Iterable[_Union[ChunkHeader, _Mapping]]] = ...) -> None: ...

class WriteChunksResponse(_message.Message):
    __slots__ = ("idempotency_key", "chunk_id", "replayed", "gone", "evicted_chunk_ids", "more")
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    EVICTED_CHUNK_IDS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    idempotency_key: bytes
    chunk_id: int
    replayed: bool
    gone: bool
    evicted_chunk_ids: _containers.RepeatedScalarFieldContainer[int]
    more: _containers.RepeatedCompositeFieldContainer[WriteChunksResponse]
    def __init__(self, idempotency_key: _Optional[bytes] = ..., chunk_id: _Optional[int] = ..., replayed: _Optional[bool] = ..., gone: _Optional[bool] = ..., evicted_chunk_ids: _Optional[_Iterable[int]] = ..., more: _Optional[_Iterable[_Union[WriteChunksResponse, _Mapping]]] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("metadata", "created_from", "created_before", "start_from", "start_before", "pinned", "any_of", "stretches")
    METADATA_FIELD_NUMBER: _ClassVar[int]
    CREATED_FROM_FIELD_NUMBER: _ClassVar[int]
    CREATED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    START_FROM_FIELD_NUMBER: _ClassVar[int]
    START_BEFORE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    ANY_OF_FIELD_NUMBER: _ClassVar[int]
    STRETCHES_FIELD_NUMBER: _ClassVar[int]
    metadata: _containers.RepeatedCompositeFieldContainer[MetadataCondition]
    created_from: _timestamp_pb2.Timestamp
    created_before: _timestamp_pb2.Timestamp
    start_from: int
    start_before: int
    pinned: bool
    any_of: _containers.RepeatedCompositeFieldContainer[Filter]
    stretches: _containers.RepeatedCompositeFieldContainer[Stretch]
    def __init__(self, metadata: _Optional[_Iterable[_Union[MetadataCondition, _Mapping]]] = ..., created_from: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., created_before: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_from: _Optional[int] = ..., start_before: _Optional[int] = ..., pinned: _Optional[bool] = ..., any_of: _Optional[_Iterable[_Union[Filter, _Mapping]]] = ..., stretches: _Optional[_Iterable[_Union[Stretch, _Mapping]]] = ...) -> None: ...

class Stretch(_message.Message):
    __slots__ = ("branch", "start_before")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    START_BEFORE_FIELD_NUMBER: _ClassVar[int]
    branch: str
    start_before: int
    def __init__(self, branch: _Optional[str] = ..., start_before: _Optional[int] = ...) -> None: ...

class MetadataCondition(_message.Message):
    __slots__ = ("key", "values", "negate", "typed")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    NEGATE_FIELD_NUMBER: _ClassVar[int]
    TYPED_FIELD_NUMBER: _ClassVar[int]
    key: str
    values: _containers.RepeatedScalarFieldContainer[str]
    negate: bool
    typed: TypedCondition
    def __init__(self, key: _Optional[str] = ..., values: _Optional[_Iterable[str]] = ..., negate: _Optional[bool] = ..., typed: _Optional[_Union[TypedCondition, _Mapping]] = ...) -> None: ...

class TypedCondition(_message.Message):
    __slots__ = ("key", "values", "at_least", "above", "at_most", "below")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    ABOVE_FIELD_NUMBER: _ClassVar[int]
    AT_MOST_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    key: str
    values: _containers.RepeatedCompositeFieldContainer[_bank_pb2.Scalar]
    at_least: _bank_pb2.Scalar
    above: _bank_pb2.Scalar
    at_most: _bank_pb2.Scalar
    below: _bank_pb2.Scalar
    def __init__(self, key: _Optional[str] = ..., values: _Optional[_Iterable[_Union[_bank_pb2.Scalar, _Mapping]]] = ..., at_least: _Optional[_Union[_bank_pb2.Scalar, _Mapping]] = ..., above: _Optional[_Union[_bank_pb2.Scalar, _Mapping]] = ..., at_most: _Optional[_Union[_bank_pb2.Scalar, _Mapping]] = ..., below: _Optional[_Union[_bank_pb2.Scalar, _Mapping]] = ...) -> None: ...

class HeldChunk(_message.Message):
    __slots__ = ("chunk_id", "checksum")
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    chunk_id: int
    checksum: int
    def __init__(self, chunk_id: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("banks", "reader_digest", "embedder_digest", "queries", "dimension", "top_k", "min_score", "min_share", "layers", "store_id", "held", "omit_payload", "skip_count", "request_id", "filter")
    BANKS_FIELD_NUMBER: _ClassVar[int]
    READER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EMBEDDER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    MIN_SHARE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    OMIT_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SKIP_COUNT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    banks: _containers.RepeatedScalarFieldContainer[str]
    reader_digest: str
    embedder_digest: str
    queries: bytes
    dimension: int
    top_k: int
    min_score: float
    min_share: float
    layers: _containers.RepeatedScalarFieldContainer[int]
    store_id: str
    held: _containers.RepeatedCompositeFieldContainer[HeldChunk]
    omit_payload: bool
    skip_count: bool
    request_id: bytes
    filter: Filter
    def __init__(self, banks: _Optional[_Iterable[str]] = ..., reader_digest: _Optional[str] = ..., embedder_digest: _Optional[str] = ..., queries: _Optional[bytes] = ..., dimension: _Optional[int] = ..., top_k: _Optional[int] = ..., min_score: _Optional[float] = ..., min_share: _Optional[float] = ..., layers: _Optional[_Iterable[int]] = ..., store_id: _Optional[str] = ..., held: _Optional[_Iterable[_Union[HeldChunk, _Mapping]]] = ..., omit_payload: _Optional[bool] = ..., skip_count: _Optional[bool] = ..., request_id: _Optional[bytes] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ...) -> None: ...

class Hit(_message.Message):
    __slots__ = ("chunk_id", "score")
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    chunk_id: int
    score: float
    def __init__(self, chunk_id: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class QueryHits(_message.Message):
    __slots__ = ("hits",)
    HITS_FIELD_NUMBER: _ClassVar[int]
    hits: _containers.RepeatedCompositeFieldContainer[Hit]
    def __init__(self, hits: _Optional[_Iterable[_Union[Hit, _Mapping]]] = ...) -> None: ...

class RetrieveHeader(_message.Message):
    __slots__ = ("store_id", "queries", "chunks", "sent")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    queries: _containers.RepeatedCompositeFieldContainer[QueryHits]
    chunks: _containers.RepeatedCompositeFieldContainer[_chunk_pb2.Chunk]
    sent: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, store_id: _Optional[str] = ..., queries: _Optional[_Iterable[_Union[QueryHits, _Mapping]]] = ..., chunks: _Optional[_Iterable[_Union[_chunk_pb2.Chunk, _Mapping]]] = ..., sent: _Optional[_Iterable[bool]] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: RetrieveHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[RetrieveHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class FetchChunksRequest(_message.Message):
    __slots__ = ("bank", "reader_digest", "chunk_ids", "layers")
    BANK_FIELD_NUMBER: _ClassVar[int]
    READER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_IDS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    bank: str
    reader_digest: str
    chunk_ids: _containers.RepeatedScalarFieldContainer[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, bank: _Optional[str] = ..., reader_digest: _Optional[str] = ..., chunk_ids: _Optional[_Iterable[int]] = ..., layers: _Optional[_Iterable[int]] = ...) -> None: ...

class FetchChunksHeader(_message.Message):
    __slots__ = ("store_id", "chunks")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    chunks: _containers.RepeatedCompositeFieldContainer[_chunk_pb2.Chunk]
    def __init__(self, store_id: _Optional[str] = ..., chunks: _Optional[_Iterable[_Union[_chunk_pb2.Chunk, _Mapping]]] = ...) -> None: ...

class FetchChunksResponse(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: FetchChunksHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[FetchChunksHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class RetrieveFilesRequest(_message.Message):
    __slots__ = ("retrieve", "nonce", "proof")
    RETRIEVE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    retrieve: RetrieveRequest
    nonce: bytes
    proof: bytes
    def __init__(self, retrieve: _Optional[_Union[RetrieveRequest, _Mapping]] = ..., nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class RetrieveFilesResponse(_message.Message):
    __slots__ = ("header", "files")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    header: RetrieveHeader
    files: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, header: _Optional[_Union[RetrieveHeader, _Mapping]] = ..., files: _Optional[_Iterable[str]] = ...) -> None: ...

class FetchFilesRequest(_message.Message):
    __slots__ = ("fetch", "nonce", "proof")
    FETCH_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    fetch: FetchChunksRequest
    nonce: bytes
    proof: bytes
    def __init__(self, fetch: _Optional[_Union[FetchChunksRequest, _Mapping]] = ..., nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class FetchFilesResponse(_message.Message):
    __slots__ = ("header", "files")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    header: FetchChunksHeader
    files: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, header: _Optional[_Union[FetchChunksHeader, _Mapping]] = ..., files: _Optional[_Iterable[str]] = ...) -> None: ...

class GetChunkRequest(_message.Message):
    __slots__ = ("bank", "chunk_id", "with_embedding")
    BANK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    WITH_EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    bank: str
    chunk_id: int
    with_embedding: bool
    def __init__(self, bank: _Optional[str] = ..., chunk_id: _Optional[int] = ..., with_embedding: _Optional[bool] = ...) -> None: ...

class GetChunkResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: _chunk_pb2.Chunk
    def __init__(self, chunk: _Optional[_Union[_chunk_pb2.Chunk, _Mapping]] = ...) -> None: ...

class ListChunksRequest(_message.Message):
    __slots__ = ("bank", "page_size", "page_token", "with_embedding", "filter")
    BANK_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WITH_EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    bank: str
    page_size: int
    page_token: str
    with_embedding: bool
    filter: Filter
    def __init__(self, bank: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., with_embedding: _Optional[bool] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ...) -> None: ...

class ListChunksResponse(_message.Message):
    __slots__ = ("chunks", "next_page_token")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[_chunk_pb2.Chunk]
    next_page_token: str
    def __init__(self, chunks: _Optional[_Iterable[_Union[_chunk_pb2.Chunk, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateChunkRequest(_message.Message):
    __slots__ = ("bank", "chunk_id", "metadata", "typed_metadata")
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
    BANK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    TYPED_METADATA_FIELD_NUMBER: _ClassVar[int]
    bank: str
    chunk_id: int
    metadata: _containers.ScalarMap[str, str]
    typed_metadata: _containers.MessageMap[str, _bank_pb2.Scalar]
    def __init__(self, bank: _Optional[str] = ..., chunk_id: _Optional[int] = ..., metadata: _Optional[_Mapping[str, str]] = ..., typed_metadata: _Optional[_Mapping[str, _bank_pb2.Scalar]] = ...) -> None: ...

class UpdateChunkResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: _chunk_pb2.Chunk
    def __init__(self, chunk: _Optional[_Union[_chunk_pb2.Chunk, _Mapping]] = ...) -> None: ...

class DeleteChunksRequest(_message.Message):
    __slots__ = ("bank", "chunk_ids")
    BANK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_IDS_FIELD_NUMBER: _ClassVar[int]
    bank: str
    chunk_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, bank: _Optional[str] = ..., chunk_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DeleteChunksResponse(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: int
    def __init__(self, deleted: _Optional[int] = ...) -> None: ...

class PinChunksRequest(_message.Message):
    __slots__ = ("bank", "chunk_ids", "pinned")
    BANK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_IDS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    bank: str
    chunk_ids: _containers.RepeatedScalarFieldContainer[int]
    pinned: bool
    def __init__(self, bank: _Optional[str] = ..., chunk_ids: _Optional[_Iterable[int]] = ..., pinned: _Optional[bool] = ...) -> None: ...

class PinChunksResponse(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: int
    def __init__(self, found: _Optional[int] = ...) -> None: ...

class Eviction(_message.Message):
    __slots__ = ("chunk_id", "reason", "retrieval_count", "start", "stored_length", "create_time", "evict_time", "metadata", "typed_metadata")
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
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_COUNT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STORED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    EVICT_TIME_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    TYPED_METADATA_FIELD_NUMBER: _ClassVar[int]
    chunk_id: int
    reason: EvictionReason
    retrieval_count: int
    start: int
    stored_length: int
    create_time: _timestamp_pb2.Timestamp
    evict_time: _timestamp_pb2.Timestamp
    metadata: _containers.ScalarMap[str, str]
    typed_metadata: _containers.MessageMap[str, _bank_pb2.Scalar]
    def __init__(self, chunk_id: _Optional[int] = ..., reason: _Optional[_Union[EvictionReason, str]] = ..., retrieval_count: _Optional[int] = ..., start: _Optional[int] = ..., stored_length: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., evict_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., metadata: _Optional[_Mapping[str, str]] = ..., typed_metadata: _Optional[_Mapping[str, _bank_pb2.Scalar]] = ...) -> None: ...

class ExplainEvictionRequest(_message.Message):
    __slots__ = ("bank", "need")
    BANK_FIELD_NUMBER: _ClassVar[int]
    NEED_FIELD_NUMBER: _ClassVar[int]
    bank: str
    need: int
    def __init__(self, bank: _Optional[str] = ..., need: _Optional[int] = ...) -> None: ...

class ExplainEvictionResponse(_message.Message):
    __slots__ = ("victims", "explanation")
    VICTIMS_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    victims: _containers.RepeatedCompositeFieldContainer[Eviction]
    explanation: str
    def __init__(self, victims: _Optional[_Iterable[_Union[Eviction, _Mapping]]] = ..., explanation: _Optional[str] = ...) -> None: ...

class ListEvictionsRequest(_message.Message):
    __slots__ = ("bank", "page_size", "page_token")
    BANK_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    bank: str
    page_size: int
    page_token: str
    def __init__(self, bank: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListEvictionsResponse(_message.Message):
    __slots__ = ("evictions", "next_page_token")
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    evictions: _containers.RepeatedCompositeFieldContainer[Eviction]
    next_page_token: str
    def __init__(self, evictions: _Optional[_Iterable[_Union[Eviction, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ("banks", "page_size", "page_token")
    BANKS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    banks: _containers.RepeatedScalarFieldContainer[str]
    page_size: int
    page_token: str
    def __init__(self, banks: _Optional[_Iterable[str]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("version", "store_id", "start_time", "resident_bytes", "free_bytes", "banks", "samples", "next_page_token", "database_bytes", "database_free_bytes", "index_bytes", "uptime", "tenants")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BANKS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DATABASE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATABASE_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    INDEX_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    version: str
    store_id: str
    start_time: _timestamp_pb2.Timestamp
    resident_bytes: int
    free_bytes: int
    banks: _containers.RepeatedCompositeFieldContainer[BankStats]
    samples: _containers.RepeatedCompositeFieldContainer[MetricSample]
    next_page_token: str
    database_bytes: int
    database_free_bytes: int
    index_bytes: int
    uptime: _duration_pb2.Duration
    tenants: _containers.RepeatedCompositeFieldContainer[_access_pb2.Tenant]
    def __init__(self, version: _Optional[str] = ..., store_id: _Optional[str] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., resident_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., banks: _Optional[_Iterable[_Union[BankStats, _Mapping]]] = ..., samples: _Optional[_Iterable[_Union[MetricSample, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., database_bytes: _Optional[int] = ..., database_free_bytes: _Optional[int] = ..., index_bytes: _Optional[int] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., tenants: _Optional[_Iterable[_Union[_access_pb2.Tenant, _Mapping]]] = ...) -> None: ...

class CompactRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CompactResponse(_message.Message):
    __slots__ = ("database_bytes_before", "database_bytes")
    DATABASE_BYTES_BEFORE_FIELD_NUMBER: _ClassVar[int]
    DATABASE_BYTES_FIELD_NUMBER: _ClassVar[int]
    database_bytes_before: int
    database_bytes: int
    def __init__(self, database_bytes_before: _Optional[int] = ..., database_bytes: _Optional[int] = ...) -> None: ...

class BankStats(_message.Message):
    __slots__ = ("bank", "index", "tenant")
    BANK_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    bank: _bank_pb2.Bank
    index: IndexStats
    tenant: str
    def __init__(self, bank: _Optional[_Union[_bank_pb2.Bank, _Mapping]] = ..., index: _Optional[_Union[IndexStats, _Mapping]] = ..., tenant: _Optional[str] = ...) -> None: ...

class IndexStats(_message.Message):
    __slots__ = ("kind", "loaded", "vectors", "tombstones", "memory_bytes", "recall")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    TOMBSTONES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    kind: _bank_pb2.IndexKind
    loaded: bool
    vectors: int
    tombstones: int
    memory_bytes: int
    recall: float
    def __init__(self, kind: _Optional[_Union[_bank_pb2.IndexKind, str]] = ..., loaded: _Optional[bool] = ..., vectors: _Optional[int] = ..., tombstones: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., recall: _Optional[float] = ...) -> None: ...

class MetricSample(_message.Message):
    __slots__ = ("name", "labels", "value")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.ScalarMap[str, str]
    value: float
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., value: _Optional[float] = ...) -> None: ...
