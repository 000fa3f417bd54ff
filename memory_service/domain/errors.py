"""The errors of the service. This file owns the list of reasons (docs/errors.md has the same), and that every failure
that this code makes carries one of them. What a reason is on the wire is said in `memory_service.api.messages.status`.
"""

import errno
from functools import singledispatch
from typing import Literal

from memory_service.domain.cancellation import Cancelled

Reason = Literal[
    "INVALID_FIELD",
    "NOT_FINITE",
    "TENSOR_MISMATCH",
    "CHECKSUM_IN_TRANSIT",
    "BANK_NOT_FOUND",
    "CHUNK_NOT_FOUND",
    "BANK_EXISTS",
    "KEY_REUSED",
    "READER_MISMATCH",
    "EMBEDDER_MISMATCH",
    "BANKS_DIFFER",
    "BANK_FULL",
    "TOO_LARGE",
    "DISK_FULL",
    "CHECKSUM_MISMATCH",
    "NOT_SERVING",
    "STORAGE_ERROR",
    "INTERNAL",
    "QUOTA_EXCEEDED",
    "STAGED_FILE",
    "NOT_SAME_HOST",
    "TENANT_NOT_FOUND",
    "TENANT_EXISTS",
    "TENANT_NOT_EMPTY",
    "BANK_CHANGED",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "API_KEY_NOT_FOUND",
    "RATE_EXCEEDED",
    "SESSION_NOT_FOUND",
    "SESSION_EXISTS",
    "LEASE_HELD",
    "LEASE_LOST",
    "TURN_CONFLICT",
    "TURN_NOT_FOUND",
    "TURN_FORGOTTEN",
]
# In bytes. A status has the message twice, the second time with up to three values.
_LONGEST_MESSAGE, _LONGEST_VALUE = 1024, 512


class ServiceError(Exception):
    """A refusal or failure that the caller sees.

    What varies in `message` also stands in `metadata`. Both are cut, because they may have a caller's words in them,
    and gRPC drops a status of more than some 8 kB.
    """

    def __init__(self, reason: Reason, message: str, **metadata: object) -> None:
        self.reason: Reason = reason
        self.message = _cut(message, _LONGEST_MESSAGE)
        self.metadata = {key: _cut(str(value), _LONGEST_VALUE) for key, value in metadata.items()}
        super().__init__(self.message)


class QuotaError(ServiceError):
    """The refusal QUOTA_EXCEEDED of a write that would pass a hard bound of its bank or its tenant.

    `subject` ("bank:NAME" or "tenant:NAME") and `description` are those of a google.rpc.QuotaFailure.
    """

    def __init__(self, subject: str, unit: str, usage: int, limit: int, size: int) -> None:
        """Say that of `limit` units `usage` are used and `size` are asked for."""
        self.subject = subject
        whose = subject.replace(":", " ", 1)
        self.description = f"the quota of {whose} is {limit} {unit}: {usage} used, {size} asked for"
        figures = {"subject": subject, "unit": unit, "usage": usage, "limit": limit, "size": size}
        super().__init__("QUOTA_EXCEEDED", self.description, **figures)


class RateError(ServiceError):
    """The refusal RATE_EXCEEDED of a call of a tenant that has made as many as it may a second.

    `subject` and `description` are as those of a QuotaError; `seconds` is when the call can be made again.
    """

    def __init__(self, tenant: str, limit: int, seconds: float) -> None:
        """Say that of a tenant `limit` calls a second are taken, and that the next is in `seconds`."""
        self.subject = f"tenant:{tenant}"
        self.seconds = seconds
        self.description = f"the quota of tenant {tenant} is {limit} calls a second; the next is in {seconds:.3f} s"
        super().__init__("RATE_EXCEEDED", self.description, subject=self.subject, limit=limit)


class AwayError(ServiceError):
    """The error STORAGE_ERROR of a storage that is out of reach, as a database is that restarts; `seconds` is when to
    ask again."""

    seconds = 0.5


class LeaseError(ServiceError):
    """The refusal LEASE_HELD of a worker that asks for a session which another one has; `seconds` is when the lease of
    that one ends, unless it is renewed."""

    def __init__(self, session_id: str, holder: str, seconds: float) -> None:
        """Say which holder has a session, and for how long yet."""
        self.seconds = seconds
        text = f"{holder!r} has the session {session_id!r}; its lease ends in {seconds:.3f} s, unless it is renewed"
        super().__init__("LEASE_HELD", text, session=session_id, holder=holder)


class StartError(Exception):
    """The error of a service that cannot start; its text is one line for the operator."""


class FolderInUse(StartError):
    """The error of a service whose data folder another process has. since: when that took it, which is another number
    each time that the folder is taken; 0 where that is not known."""

    def __init__(self, text: str, since: int = 0) -> None:
        super().__init__(text)
        self.since = since


def invalid(field: str, message: str) -> ServiceError:
    """Make the error INVALID_FIELD, which names the field."""
    return ServiceError("INVALID_FIELD", f"{field}: {message}", field=field)


@singledispatch
def refusal_for(_error: Exception) -> ServiceError | None:
    """Return what a caller is told of an error that the code below has raised; None for a defect.

    A storage engine registers here what the errors of its own libraries mean.
    """
    return None


@refusal_for.register
def _(error: ServiceError) -> ServiceError:
    return error


@refusal_for.register
def _(_error: Cancelled) -> ServiceError:
    return broken_off()


@refusal_for.register
def _(error: OSError) -> ServiceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full()
    name = errno.errorcode.get(error.errno or 0, "unknown")
    return ServiceError("STORAGE_ERROR", f"the storage answered with an error ({name})", errno=name)


def unauthenticated() -> ServiceError:
    """Make the error UNAUTHENTICATED. Its words are the same whatever is wrong with the key, or without one."""
    return ServiceError("UNAUTHENTICATED", "the call needs a key that is valid here")


def right_missing(method: str, right: str) -> ServiceError:
    """Make the error PERMISSION_DENIED of a caller whose role does not allow a method."""
    text = f"the role of the caller does not allow {method}, which asks for the right {right!r}"
    return ServiceError("PERMISSION_DENIED", text, right=right)


def keys_not_allowed() -> ServiceError:
    """Make the error PERMISSION_DENIED of a caller whose role may manage keys, but not these."""
    text = "the caller may not manage these keys: an admin manages those of its own tenant, but for those of operators"
    return ServiceError("PERMISSION_DENIED", f"{text}; an admin of some banks alone manages none", right="keys")


def bank_not_allowed(name: str) -> ServiceError:
    """Make the error PERMISSION_DENIED of a caller whose key names other banks, whether this one exists or not."""
    return ServiceError("PERMISSION_DENIED", f"the caller's key does not allow the bank {name!r}", bank=name)


def api_key_not_found(key_id: str) -> ServiceError:
    """Make the error API_KEY_NOT_FOUND."""
    return ServiceError("API_KEY_NOT_FOUND", f"there is no key {key_id!r}", key_id=key_id)


def bank_not_found(name: str) -> ServiceError:
    """Make the error BANK_NOT_FOUND."""
    return ServiceError("BANK_NOT_FOUND", f"there is no bank {name!r}", bank=name)


def tenant_not_found(name: str) -> ServiceError:
    """Make the error TENANT_NOT_FOUND."""
    return ServiceError("TENANT_NOT_FOUND", f"there is no tenant {name!r}", tenant=name)


def chunk_not_found(name: str, chunk_id: int) -> ServiceError:
    """Make the error CHUNK_NOT_FOUND for a chunk of the bank of this name."""
    return ServiceError("CHUNK_NOT_FOUND", f"bank {name} has no chunk {chunk_id}", chunk_id=chunk_id)


def session_not_found(session: str) -> ServiceError:
    """Make the error SESSION_NOT_FOUND, also for a session that the caller may not see. session: its id or name."""
    return ServiceError("SESSION_NOT_FOUND", f"there is no session {session!r}", session=session)


def session_exists(name: str) -> ServiceError:
    """Make the error SESSION_EXISTS."""
    return ServiceError("SESSION_EXISTS", f"there is a session {name!r} already", session=name)


def lease_held(session_id: str, holder: str, seconds: float) -> ServiceError:
    """Make the error LEASE_HELD. seconds: until the lease of the holder ends."""
    return LeaseError(session_id, holder, seconds)


def lease_lost(session_id: str, epoch: int) -> ServiceError:
    """Make the error LEASE_LOST."""
    text = f"the lease {epoch} of session {session_id!r} has ended, or was given anew since; acquire the session again"
    return ServiceError("LEASE_LOST", text, session=session_id, epoch=epoch)


def turn_conflict(session_id: str, turn: int, head: int) -> ServiceError:
    """Make the error TURN_CONFLICT of a turn that the caller takes for the last one. head: what is the last one."""
    text = f"the last turn of session {session_id!r} is {head}, not {turn}; read what was appended since"
    return ServiceError("TURN_CONFLICT", text, session=session_id, head=head)


def turn_not_found(session: str, turn: int | str) -> ServiceError:
    """Make the error TURN_NOT_FOUND. session: its id, "" where the turn is asked for by its key. turn: its number or
    key."""
    of = f" of session {session!r}" if session else ""
    return ServiceError("TURN_NOT_FOUND", f"there is no turn {turn!r}{of}", session=session, turn=turn)


def turn_forgotten(branch: str, start: int) -> ServiceError:
    """Make the error TURN_FORGOTTEN of a chunk whose tokens were forgotten."""
    text = f"the tokens from {start} on of branch {branch!r} were forgotten; read the turns of the session again"
    return ServiceError("TURN_FORGOTTEN", text, branch=branch, start=start)


def damaged_session(session: str) -> ServiceError:
    """Make the error CHECKSUM_MISMATCH for a session whose record is not as it was written."""
    text = f"the record of session {session!r} is damaged; see: kvbank check"
    return ServiceError("CHECKSUM_MISMATCH", text, session=session)


def damaged_turn(session: str, turn: int) -> ServiceError:
    """Make the error CHECKSUM_MISMATCH for a turn whose record is not as it was written."""
    text = f"the record of turn {turn} of session {session!r} is damaged; see: kvbank check"
    return ServiceError("CHECKSUM_MISMATCH", text, session=session, turn=turn)


def damaged_chunk(chunk_id: int) -> ServiceError:
    """Make the error CHECKSUM_MISMATCH for a chunk that was quarantined."""
    text = f"stored bytes of chunk {chunk_id} are damaged; it is quarantined"
    return ServiceError("CHECKSUM_MISMATCH", text, chunk_id=chunk_id)


def not_mounted(name: str) -> ServiceError:
    """Make the error STORAGE_ERROR for a bank whose payloads are not in the place that was made for them."""
    text = f"the payloads of bank {name} are not there; is a disk not mounted?"
    return ServiceError("STORAGE_ERROR", text, errno="ENOENT")


def staged_file(name: str, why: str) -> ServiceError:
    """Make the error STAGED_FILE, upon which the client writes the chunk over the stream. why: the end of its
    sentence."""
    return ServiceError("STAGED_FILE", f"staged file {name[:64]!r} {why}", name=name[:64])


def broken_off() -> ServiceError:
    """Make the error NOT_SERVING of a call whose caller has gone."""
    return ServiceError("NOT_SERVING", "the call was broken off")


def disk_full() -> ServiceError:
    """Make the error DISK_FULL of a disk that has not a byte left."""
    return ServiceError("DISK_FULL", "the disk is full", free=0)


def _cut(text: str, most: int) -> str:
    """Cut a text to so many bytes of UTF-8, and tell whether it had more."""
    data = text.encode(errors="replace")
    return text if len(data) <= most else data[:most].decode(errors="ignore") + "..."
