"""What clients said and were told: the promises that a store is held to. Appended by any number of processes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.shim import Op, Record, mark, records


class Journal:
    """A file of events; the log of a shim may be one, and then they stand in order with what happened to the files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._heard = 0
        path.touch()

    def say(self, event: str, **fields: Any) -> None:
        mark(self._path, json.dumps({"event": event} | fields).encode())

    def waits(self) -> bool:
        """Tell whether `news` would have some."""
        return self._path.stat().st_size > self._heard

    def news(self) -> Iterator[dict[str, Any]]:
        """Return what was said since the last call; no other process may be saying something meanwhile."""
        begin, self._heard = self._heard, self._path.stat().st_size
        return (event_of(record) for record in records(self._path, begin) if record.op is Op.MARK)


def event_of(mark_: Record) -> dict[str, Any]:
    """Return the event that a MARK of a log holds."""
    event: dict[str, Any] = json.loads(mark_.data)
    return event


class Promises:
    """The sum of a journal, for one bank."""

    def __init__(self, bank: str) -> None:
        self.bank = bank
        # True from its creation on, None while it is being deleted.
        self.exists: bool | None = False
        self.removed = False
        # Chunk id -> key.
        self.acknowledged: dict[int, bytes] = {}
        self.evicted: set[int] = set()
        # Of these, what the store's own log said.
        self.logged: set[int] = set()
        self.deleting: set[int] = set()
        self.deleted: set[int] = set()
        # Ids that were acknowledged for two keys.
        self.twice: set[int] = set()

    def acknowledge(self, chunk_id: int, key: bytes) -> None:
        """Take an id for that of a key."""
        if self.acknowledged.setdefault(chunk_id, key) != key:
            self.twice.add(chunk_id)

    def hear(self, event: dict[str, Any]) -> None:
        if event["bank"] != self.bank:
            return
        match event["event"]:
            case "created":
                self.exists = True
            case "removing":
                self.exists = None
            case "removed":
                self.exists, self.removed = False, True
            case "acknowledged":
                self.acknowledge(event["id"], bytes.fromhex(event["key"]))
                self.evicted.update(event["evicted"])
            case "deleting":
                self.deleting.update(event["ids"])
            case "deleted":
                self.deleted.update(event["ids"])
