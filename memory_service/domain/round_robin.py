"""A queue of things that have owners. This file owns the order: each owner in turn has one thing, and the things of one
owner keep their order, so that an owner with many things waiting makes no other wait for all of these."""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class RoundRobin(Generic[T]):
    """Holds the things that wait. Where threads share it, a lock of the caller guards it."""

    def __init__(self) -> None:
        # The owner who is next stands first. Owners without anything that waits are not there.
        self._waiting: dict[str, deque[T]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, owner: str, thing: T) -> None:
        """Let a thing of an owner wait behind the owner's others."""
        self._waiting.setdefault(owner, deque()).append(thing)

    def put_first(self, owner: str, thing: T) -> None:
        """Let a thing of an owner wait before the owner's others, and take its turn behind those of other owners that
        wait."""
        things = self._waiting.pop(owner, deque())
        things.appendleft(thing)
        self._waiting[owner] = things

    def take(self) -> T:
        """Return the first thing of the owner who is next, after whom the others come. Errors: IndexError where nothing
        waits."""
        owner = next(iter(self._waiting), None)
        if owner is None:
            raise IndexError("nothing waits")
        things = self._waiting.pop(owner)
        thing = things.popleft()
        if things:
            self._waiting[owner] = things  # behind the others
        return thing
