from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_FIELD: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_FINITE: _ClassVar[ErrorReason]
    ERROR_REASON_TENSOR_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_CHECKSUM_IN_TRANSIT: _ClassVar[ErrorReason]
    ERROR_REASON_BANK_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_CHUNK_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_BANK_EXISTS: _ClassVar[ErrorReason]
    ERROR_REASON_KEY_REUSED: _ClassVar[ErrorReason]
    ERROR_REASON_READER_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_EMBEDDER_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_BANKS_DIFFER: _ClassVar[ErrorReason]
    ERROR_REASON_BANK_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_TOO_LARGE: _ClassVar[ErrorReason]
    ERROR_REASON_DISK_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_CHECKSUM_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_SERVING: _ClassVar[ErrorReason]
    ERROR_REASON_STORAGE_ERROR: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_QUOTA_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_STAGED_FILE: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_SAME_HOST: _ClassVar[ErrorReason]
    ERROR_REASON_TENANT_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_TENANT_EXISTS: _ClassVar[ErrorReason]
    ERROR_REASON_TENANT_NOT_EMPTY: _ClassVar[ErrorReason]
    ERROR_REASON_UNAUTHENTICATED: _ClassVar[ErrorReason]
    ERROR_REASON_PERMISSION_DENIED: _ClassVar[ErrorReason]
    ERROR_REASON_API_KEY_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_RATE_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_BANK_CHANGED: _ClassVar[ErrorReason]
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_INVALID_FIELD: ErrorReason
ERROR_REASON_NOT_FINITE: ErrorReason
ERROR_REASON_TENSOR_MISMATCH: ErrorReason
ERROR_REASON_CHECKSUM_IN_TRANSIT: ErrorReason
ERROR_REASON_BANK_NOT_FOUND: ErrorReason
ERROR_REASON_CHUNK_NOT_FOUND: ErrorReason
ERROR_REASON_BANK_EXISTS: ErrorReason
ERROR_REASON_KEY_REUSED: ErrorReason
ERROR_REASON_READER_MISMATCH: ErrorReason
ERROR_REASON_EMBEDDER_MISMATCH: ErrorReason
ERROR_REASON_BANKS_DIFFER: ErrorReason
ERROR_REASON_BANK_FULL: ErrorReason
ERROR_REASON_TOO_LARGE: ErrorReason
ERROR_REASON_DISK_FULL: ErrorReason
ERROR_REASON_CHECKSUM_MISMATCH: ErrorReason
ERROR_REASON_NOT_SERVING: ErrorReason
ERROR_REASON_STORAGE_ERROR: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_QUOTA_EXCEEDED: ErrorReason
ERROR_REASON_STAGED_FILE: ErrorReason
ERROR_REASON_NOT_SAME_HOST: ErrorReason
ERROR_REASON_TENANT_NOT_FOUND: ErrorReason
ERROR_REASON_TENANT_EXISTS: ErrorReason
ERROR_REASON_TENANT_NOT_EMPTY: ErrorReason
ERROR_REASON_UNAUTHENTICATED: ErrorReason
ERROR_REASON_PERMISSION_DENIED: ErrorReason
ERROR_REASON_API_KEY_NOT_FOUND: ErrorReason
ERROR_REASON_RATE_EXCEEDED: ErrorReason
ERROR_REASON_BANK_CHANGED: ErrorReason
