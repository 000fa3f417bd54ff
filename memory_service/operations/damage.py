"""Damage that a reader meets. This file owns that a damaged chunk is taken out of service, so that the next call
answers without it, and that a disk which is not mounted is taken for no damage."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from memory_service.domain.errors import ServiceError, bank_not_found, damaged_chunk, not_mounted
from memory_service.domain.model import Bank
from memory_service.storage.base import FlawedError, Objects, Store

_log = logging.getLogger(__name__)
_BYTES = "stored bytes are damaged"


class Damage:
    """Takes damaged chunks of an engine out of service. Threads may share it."""

    def __init__(self, store: Store, objects: Objects) -> None:
        self._store, self._objects = store, objects

    def set_aside(self, bank: Bank, chunk_id: int, why: str = _BYTES) -> None:
        """Take a damaged chunk out of service; its object and what its record said are kept aside.

        why: a sentence. Errors: STORAGE_ERROR when no object of the bank is there: then a disk is missing, and the
        chunk is not damaged.
        """
        if bank.kv.layers and not self._objects.there(bank.uid):
            raise not_mounted(bank.name)
        if self._store.set_aside(bank, {chunk_id: why}):
            _log.error("chunk %d of bank %s is damaged and quarantined", chunk_id, bank.title)

    @contextmanager
    def without_flawed(self) -> Iterator[None]:
        """Take rows that the block meets and that cannot be used out of service, so that the next call does without
        them. Errors: CHECKSUM_MISMATCH for this call."""
        try:
            yield
        except FlawedError as error:
            for chunk_id, why in error.flaws.items():
                self.set_aside(error.bank, chunk_id, why)
            raise damaged_chunk(min(error.flaws)) from error

    def refusal_for(self, bank: Bank, chunk_id: int) -> ServiceError | None:
        """Take a chunk whose object is damaged or missing out of service, and return the error CHECKSUM_MISMATCH.

        Where the chunk itself is gone, nothing is wrong, and None is returned; where its bank is gone, whose objects go
        before its last rows, BANK_NOT_FOUND is.
        """
        with self.without_flawed(), self._store.read(bank.tenant) as view:
            if not view.exists(bank):
                return bank_not_found(bank.name)
            if view.chunk(bank, chunk_id) is None:
                return None
        self.set_aside(bank, chunk_id)
        return damaged_chunk(chunk_id)
