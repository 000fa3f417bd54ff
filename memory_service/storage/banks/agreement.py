"""When a bank is the one that a caller means, and how many there may be."""

from memory_service.domain.errors import ServiceError
from memory_service.domain.model import Bank
from memory_service.storage.base import Seen


def check_same(found: Bank, new: Bank) -> None:
    """Refuse to take a bank for a new one of its tenant and name whose specs are others. Errors: BANK_EXISTS."""
    # A hidden size that is not stated is whatever the bank's is.
    other_size = new.kv.hidden_size not in (0, found.kv.hidden_size)
    if other_size or (found.kv, found.embedding) != (new.kv, new.embedding):
        text = f"there is a bank {new.name!r} with another spec"
        raise ServiceError(
            "BANK_EXISTS",
            text,
            bank_digest=found.kv.reader_digest,
            request_digest=new.kv.reader_digest,
        )


def check_seen(old: Bank, seen: Seen, new: Bank, by_uid: str) -> None:
    """Refuse to replace a bank that is no longer as it was seen, or by another bank than was meant. Errors:
    BANK_CHANGED."""
    if (old.uid, old.usage.chunks, old.usage.chunks_written) != seen[1:]:
        text = f"bank {old.name!r} has changed since it was looked at"
        raise ServiceError("BANK_CHANGED", text, bank=old.name)
    if new.uid != by_uid:
        raise ServiceError("BANK_CHANGED", f"bank {new.name!r} is another one than was looked at", bank=new.name)


def check_bound(what: str, limit: int, size: int) -> None:
    """Refuse what would be too much for all tenants together. The size is not told, which says how much others have.
    Errors: TOO_LARGE."""
    if size > limit:
        raise ServiceError("TOO_LARGE", f"this server takes at most {limit} {what} together", limit=limit)
