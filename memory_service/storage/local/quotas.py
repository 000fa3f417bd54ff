"""The quotas of banks, in the transaction of the change that they bound."""

from sqlalchemy import Connection

from memory_service.domain.chunk_size import size_of
from memory_service.domain.errors import QuotaError, bank_not_found
from memory_service.domain.model import Bank, Chunk, Quota, Unit
from memory_service.storage.local.records import bank_rows

_UNITS: tuple[Unit, ...] = ("chunks", "tokens", "bytes")


def check_chunk(connection: Connection, bank: Bank, chunk: Chunk) -> None:
    """Refuse a chunk beyond the quota; call this after the evictions, which may have made room. Errors: BANK_NOT_FOUND,
    QUOTA_EXCEEDED."""
    if bank.quota == Quota():
        return
    usage = bank_rows.usage(connection, bank.bank_id)
    if usage is None:
        raise bank_not_found(bank.name)
    for unit in _UNITS:
        check(bank, unit, getattr(usage, unit), size_of(chunk, unit))


def check(bank: Bank, unit: Unit, used: int, more: int) -> None:
    """Refuse what would take more than the quota. Errors: QUOTA_EXCEEDED."""
    limit = getattr(bank.quota, unit)
    if limit and used + more > limit:
        raise QuotaError(bank.name, unit, used, limit, more)
