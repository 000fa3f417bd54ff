"""The model goes to the caller that has used it least: callers get equal shares, and the sessions of a caller do.

Each caller, and each session of a caller, has a count of what it has used. The next one is the caller that has used
least, and of its sessions the one that has used least. Who begins, or comes back, starts at the count of the one that
had the model last: it gets an equal share from then on, and nothing for the time before. The least count of those that
are there would not do: it stays where it is while any of them waits to begin, and who has had most of an answer would
wait for all that come behind it.
"""

import threading
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Used:
    """What one caller or session has used. there: its requests that run or wait. level: what that part of it had used
    which had the model last; it never falls."""

    used: float = 0.0
    level: float = 0.0
    there: int = 0
    parts: dict[Hashable, "_Used"] = field(default_factory=dict)

    def enter(self, name: Hashable) -> "_Used":
        """Return the part of a name, with one request more."""
        found = self.parts.get(name)
        if found is None:
            found = self.parts[name] = _Used(self.level)
        found.there += 1
        return found

    def charge(self, name: Hashable, cost: float) -> "_Used":
        """Note that the part of a name has used the model, and return it."""
        part = self.parts[name]
        self.level = max(self.level, part.used)
        part.used += cost
        return part

    def leave(self, name: Hashable) -> None:
        """Take a request away, and the part with its last one."""
        part = self.parts[name]
        part.there -= 1
        if not part.there:
            del self.parts[name]


@dataclass(frozen=True, slots=True)
class Claimant:
    """Whose request it is: a caller and its session."""

    caller: Hashable
    session: Hashable


class FairShare:
    """The shares of all callers whose requests run or wait; threads may use it at the same time."""

    def __init__(self) -> None:
        self._all = _Used()
        self._lock = threading.Lock()

    def enter(self, who: Claimant) -> None:
        """Count one request more of a caller and session."""
        with self._lock:
            self._all.enter(who.caller).enter(who.session)

    def leave(self, who: Claimant) -> None:
        """Count one request less."""
        with self._lock:
            self._all.parts[who.caller].leave(who.session)
            self._all.leave(who.caller)

    def charge(self, who: Claimant, cost: float) -> None:
        """Note that a request has used the model. cost: in tokens that were decoded, or what takes as long."""
        with self._lock:
            self._all.charge(who.caller, cost).charge(who.session, cost)

    def next_of(self, waiting: Iterable[Claimant]) -> Claimant:
        """Return who comes next; of equals, the first."""
        with self._lock:
            return min(waiting, key=self._used)

    def in_order(self, waiting: Iterable[Claimant]) -> list[Claimant]:
        """Return the same in the order in which they come next; of equals, the first."""
        with self._lock:
            return sorted(waiting, key=self._used)

    def _used(self, who: Claimant) -> tuple[float, float]:
        caller = self._all.parts[who.caller]
        return caller.used, caller.parts[who.session].used
