"""One request as the server sees it: id, method and bank, which its log records carry, and the reason of its error."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

LONGEST_LOGGED = 200


@dataclass(slots=True)
class Request:
    """Shared by the tasks and threads that work on it. `reason`: of the error that ends it."""

    id: str
    method: str
    bank: str = ""
    reason: str = ""

    def of(self, message: Any) -> None:
        """Take the name of the bank from a request message, whatever its field is called."""
        for whole in ("retrieve", "fetch"):
            message = getattr(message, whole, message)
        for field in ("bank", "name", "banks"):
            value = getattr(message, field, "")
            value = getattr(value, "name", value)  # CreateBank and UpdateBank have a whole bank
            if text := value if isinstance(value, str) else ",".join(value):
                self.bank = text[:LONGEST_LOGGED]
                return


_current: ContextVar[Request | None] = ContextVar("kvbank_request", default=None)


def current() -> Request | None:
    """The request that this task or thread works on."""
    return _current.get()


def enter(request: Request) -> None:
    """The running task works on it from here to its end; so do the tasks that it makes."""
    _current.set(request)
