"""What can be forgotten, over any engine; `access.tenants` forgets whole tenants. This file owns who may: a session, a
turn or a bank that the caller may not see is for it as one that is not there, and what a tenant has is forgotten by
those who may write in it.

Methods block, long ones too, and are called from storage threads.
"""

from memory_service.domain.access import EVERY_BANK, Caller
from memory_service.domain.errors import ServiceError, invalid, right_missing, session_not_found, turn_not_found
from memory_service.domain.forgetting import Receipt
from memory_service.domain.model import Filter
from memory_service.operations.banks import Banks
from memory_service.operations.sessions import Sessions
from memory_service.storage.base import Engine


class Forgetting:
    """Forgets what callers ask for; what was forgotten before is answered with its receipt. All methods raise
    PERMISSION_DENIED, and what those of `storage.base.Forgetting` do."""

    def __init__(self, engine: Engine, banks: Banks, sessions: Sessions) -> None:
        self._forgetting, self._banks, self._sessions = engine.forgetting, banks, sessions

    def turns(self, caller: Caller, session_id: str, first: int, last: int) -> Receipt:
        """Forget turns of a session, both bounds included. Errors: INVALID_FIELD, SESSION_NOT_FOUND, TURN_NOT_FOUND."""
        _check(caller)
        if first > last:
            raise invalid("turns.first", f"must not be behind the last one, {last}")
        if not (gone := self._sessions.is_gone(caller, session_id)):
            self._sessions.get(caller, session_id)
        receipt = self._forgetting.turns(caller.tenant, session_id, first, last, caller.key_id)
        return _allowed(caller, receipt, gone, session_not_found(session_id))

    def turn(self, caller: Caller, key: str) -> Receipt:
        """Forget the turn that has a key. Errors: TURN_NOT_FOUND."""
        _check(caller)
        if not (gone := self._sessions.is_turn_gone(caller, key)):
            self._sessions.turn(caller, key, token_ids=False)
        receipt = self._forgetting.turn(caller.tenant, key, caller.key_id)
        return _allowed(caller, receipt, gone, turn_not_found("", key))

    def session(self, caller: Caller, session_id: str) -> Receipt:
        """Forget a session with its chunks. Errors: SESSION_NOT_FOUND."""
        _check(caller)
        if not (gone := self._sessions.is_gone(caller, session_id)):
            self._sessions.get(caller, session_id)
        receipt = self._forgetting.session(caller.tenant, session_id, caller.key_id)
        return _allowed(caller, receipt, gone, session_not_found(session_id))

    def chunks(self, caller: Caller, bank: str, where: Filter) -> Receipt:
        """Forget the chunks of a bank that a filter lets pass. Errors: BANK_NOT_FOUND, CHECKSUM_MISMATCH."""
        _check(caller)
        found = self._banks.named(caller.tenant, bank)
        with self._banks.damage.without_flawed():
            return self._forgetting.chunks(found, where, caller.key_id)


def _allowed(caller: Caller, receipt: Receipt, gone: bool, refusal: ServiceError) -> Receipt:
    """Return a receipt that the caller may see. gone: whether it is of something that was gone before; of that a caller
    of some banks gets its own receipts alone. Errors: the refusal."""
    if gone and caller.banks != EVERY_BANK and receipt.key_id != caller.key_id:
        raise refusal
    return receipt


def _check(caller: Caller) -> None:
    """Refuse a caller who may forget tenants alone. Errors: PERMISSION_DENIED."""
    if not caller.may("write"):
        raise right_missing("Forget", "write")
