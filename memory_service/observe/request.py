"""The request that a task or thread works on: its id, method and bank, which log records carry, and the reason of the
error that ends it."""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from memory_service.domain.access import Caller

# The most characters of a name that are logged.
LONGEST_LOGGED = 200
_SESSIONS = "kvbank/v1/session.proto"
# The fields of a request to forget that have more than one word.
_PARTS_OF_FORGET = {"turns": "turns", "chunks": "chunks"}
# The names of banks of one request that are logged.
_MOST_NAMES = 3


@dataclass(slots=True)
class Request:
    """One request, shared by the tasks and threads that work on it. `bank` has the names of its banks, `session` the id
    of its session, `receipt` the id of what it is told by when it forgets, `reason` is that of the error that ends the
    request, `peer` the address that it came from; each is empty where there is none. `caller` is None until it is known
    who calls."""

    id: str
    method: str
    bank: str = ""
    reason: str = ""
    peer: str = ""
    caller: Caller | None = None
    session: str = ""
    receipt: str = ""

    def of(self, message: Any) -> None:
        """Take the name of the bank, or the id of the session, from a request message, whatever its field is called."""
        if message.DESCRIPTOR.file.name == _SESSIONS:
            # Names of sessions are left out, because they may say what a conversation is about.
            if message.DESCRIPTOR.name == "ForgetRequest":
                message = getattr(
                    message, {"turns": "turns", "chunks": "chunks"}.get(message.WhichOneof("target"), ""), message
                )
            self.session = str(getattr(message, "session_id", ""))[:LONGEST_LOGGED]
            message = getattr(message, "session", message)
            self.bank = str(getattr(message, "bank", ""))[:LONGEST_LOGGED]
            return
        for whole in ("retrieve", "fetch"):
            message = getattr(message, whole, message)
        for field in ("bank", "name", "banks"):
            value = getattr(message, field, "")
            value = getattr(value, "name", value)  # CreateBank and UpdateBank have a whole bank
            if text := value if isinstance(value, str) else _few(value):
                self.bank = text[:LONGEST_LOGGED]
                return


def _few(names: Sequence[str]) -> str:
    """Join the first names, and say how many there are besides."""
    more = len(names) - _MOST_NAMES
    return ",".join(name[:LONGEST_LOGGED] for name in names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


_current: ContextVar[Request | None] = ContextVar("kvbank_request", default=None)


def current() -> Request | None:
    """Return the request that this task or thread works on."""
    return _current.get()


def enter(request: Request) -> None:
    """Make this the request that the running task works on from here to its end, and the tasks that it makes."""
    _current.set(request)
