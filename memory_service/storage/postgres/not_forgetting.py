"""What a caller is told who asks a store in a database to forget for good."""

from typing import NoReturn

from memory_service.domain.errors import ServiceError
from memory_service.domain.model import Bank, Filter


def _refuse() -> NoReturn:
    text = "a store in a database does not forget for good yet; delete chunks, sessions or tenants instead"
    raise ServiceError("STORAGE_ERROR", text, errno="ENOTSUP")


class NotForgetting:
    """Implements `memory_service.storage.base.Forgetting` by refusing it."""

    def turns(self, tenant: str, session_id: str, first: int, last: int, key_id: str) -> NoReturn:
        """Refuse to forget turns."""
        _refuse()

    def turn(self, tenant: str, key: str, key_id: str) -> NoReturn:
        """Refuse to forget a turn."""
        _refuse()

    def session(self, tenant: str, session_id: str, key_id: str) -> NoReturn:
        """Refuse to forget a session."""
        _refuse()

    def chunks(self, bank: Bank, where: Filter, key_id: str) -> NoReturn:
        """Refuse to forget chunks."""
        _refuse()

    def tenant(self, name: str, key_id: str) -> NoReturn:
        """Refuse to forget a tenant."""
        _refuse()
