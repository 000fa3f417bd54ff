"""Every error of the SDK.

KVBankError
├── ClientClosed                 the client was closed
├── ClientForked                 the client belongs to the parent of this process
├── LoopMismatch                 the client belongs to another event loop
├── MissingExtra                 an optional part of kvbank is not installed
└── ServiceError                 a request was refused or failed
    ├── InvalidArgument          (a ValueError too) malformed request, tensor, embedding or target
    ├── NotFound
    │   ├── BankNotFound
    │   ├── ChunkNotFound
    │   ├── ApiKeyNotFound
    │   ├── TenantNotFound
    │   ├── SessionNotFound
    │   └── TurnNotFound
    ├── AlreadyExists            a bank with another spec, or an idempotency key with other content
    │   └── SessionExists        a session of this name
    ├── FailedPrecondition       among them: banks of one request whose specs differ
    │   ├── ReaderMismatch       K-V of another model
    │   ├── EmbedderMismatch     embeddings of another embedder
    │   ├── LeaseHeld            another worker has the session
    │   ├── LeaseLost            the lease has ended, or another worker has one since
    │   └── TurnConflict         the session's last turn is another one than was named
    ├── ResourceExhausted
    │   ├── BankFull             the bank is full and its policy refuses
    │   ├── QuotaExceeded        the write would pass a hard quota of the bank or the tenant
    │   ├── RateExceeded         the tenant has made as many calls as it may a second; retryable
    │   ├── TooLarge             a chunk, an answer or a message is over a limit
    │   └── DiskFull             the server keeps back its last free space
    ├── DataLoss                 bytes do not match their checksum
    ├── Unavailable              no connection, or the server is starting or stopping; retryable
    ├── Untrusted                TLS fails: another certificate than the client trusts, or no TLS at all
    ├── DeadlineExceeded         no answer within the deadline
    ├── Unauthenticated          the service wants a key, and has none that is valid
    ├── PermissionDenied         the role or the banks of the key do not allow the request
    └── Internal                 a fault of the server or of the connection; any other code too
"""

from collections.abc import Mapping


class KVBankError(Exception):
    """Base of every error that this package raises on purpose."""


class ClientClosed(KVBankError):
    """The client was closed."""


class ClientForked(KVBankError):
    """The client was made before a fork, in the parent process; make one in the child."""


class LoopMismatch(KVBankError):
    """An `AsyncClient` belongs to the event loop of its first call; make one in this loop."""


class MissingExtra(KVBankError):
    """An optional part of kvbank is not installed."""


class ServiceError(KVBankError):
    """A request that was refused or failed.

    Attributes:
        code: name of the gRPC status code, such as "NOT_FOUND".
        reason: name from docs/errors.md, such as "BANK_NOT_FOUND", or one of the client's own (docs/sdk.md); empty when
            the error was made inside gRPC.
        metadata: what varies in the message, by name.
        request_id: id under which the server logged the call; empty when nothing was sent.
        retryable: whether the same request may succeed later, unchanged.
        retry_after: the seconds after which the server says that the request can be made again; None where it says
            nothing.
    """

    code = "UNKNOWN"
    retry_after: float | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.request_id = request_id

    @property
    def retryable(self) -> bool:
        return self.code == "UNAVAILABLE"


class InvalidArgument(ServiceError, ValueError):
    """The request is malformed; it fails again however often it is sent."""

    code = "INVALID_ARGUMENT"


class NotFound(ServiceError):
    """What the request names does not exist, or the caller may not see it."""

    code = "NOT_FOUND"


class BankNotFound(NotFound):
    """The bank does not exist, or the caller may not see it."""


class ChunkNotFound(NotFound):
    """The chunk does not exist (any more)."""


class ApiKeyNotFound(NotFound):
    """There is no key of this id, or the caller may not see it."""


class TenantNotFound(NotFound):
    """There is no such tenant."""


class SessionNotFound(NotFound):
    """There is no such session, or the caller may not see it."""


class TurnNotFound(NotFound):
    """There is no such turn (any more)."""


class AlreadyExists(ServiceError):
    """A bank of this name with another spec, or an idempotency key with other content."""

    code = "ALREADY_EXISTS"


class SessionExists(AlreadyExists):
    """There is a session of this name."""


class FailedPrecondition(ServiceError):
    """The request does not fit the state of the bank."""

    code = "FAILED_PRECONDITION"


class ReaderMismatch(FailedPrecondition):
    """K-V of another model; `metadata` has bank_digest and request_digest."""


class EmbedderMismatch(FailedPrecondition):
    """Embeddings of another embedder; `metadata` has bank_digest and request_digest."""


class LeaseHeld(FailedPrecondition):
    """Another worker has the session; `retry_after` has the seconds after which its lease ends at the latest, unless it
    is renewed."""

    @property
    def holder(self) -> str:
        """Return what the worker that has the session calls itself."""
        return self.metadata.get("holder", "")


class LeaseLost(FailedPrecondition):
    """The lease has ended, or another worker has one since; nothing was done."""


class TurnConflict(FailedPrecondition):
    """The session's last turn is not the one that was named; `metadata` has session and head. Nothing was done."""


class ResourceExhausted(ServiceError):
    """A limit was reached."""

    code = "RESOURCE_EXHAUSTED"


class BankFull(ResourceExhausted):
    """The bank is full and its policy refuses the write."""


class QuotaExceeded(ResourceExhausted):
    """The write would pass a hard quota of the bank or the tenant; `metadata` has subject, unit, usage, limit and
    size."""

    @property
    def subject(self) -> str:
        """Return what the quota is of: "bank:NAME" or "tenant:NAME"."""
        return self.metadata.get("subject", "")


class RateExceeded(ResourceExhausted):
    """The tenant has made as many calls as it may a second; nothing was done. The call was made again, as the server
    said, until its deadline; `retry_after` has the seconds after which it can be made once more, and `metadata` has
    subject and limit."""

    @property
    def retryable(self) -> bool:
        return True


class TooLarge(ResourceExhausted):
    """A chunk, an answer or a message is over a limit; `metadata` has limit and size where they are known."""


class DiskFull(ResourceExhausted):
    """The server has no free space beyond what it keeps back."""


class DataLoss(ServiceError):
    """Bytes do not match their checksum, on the server's disk or on the way here."""

    code = "DATA_LOSS"


class Unavailable(ServiceError):
    """No connection, or the server is starting or stopping."""

    code = "UNAVAILABLE"


class Untrusted(ServiceError):
    """TLS with the server fails, by what one of the two is; so it fails again, and nothing was sent."""

    code = "UNAVAILABLE"

    @property
    def retryable(self) -> bool:
        return False


class DeadlineExceeded(ServiceError):
    """No answer within the deadline."""

    code = "DEADLINE_EXCEEDED"


class Unauthenticated(ServiceError):
    """The service wants a key, and the call has none that is valid there."""

    code = "UNAUTHENTICATED"


class PermissionDenied(ServiceError):
    """The role of the key, or its banks, do not allow the request; `metadata` has right or bank."""

    code = "PERMISSION_DENIED"


class Internal(ServiceError):
    """A fault of the server or of the connection."""

    code = "INTERNAL"
