"""The mark of a store that is being made as a copy of another one, and that nothing serves until it is whole. It is a
row of `leases` that does not end by itself: who makes the store is alone with it."""

import json

from sqlalchemy import Connection

from memory_service.domain.errors import StartError
from memory_service.storage.postgres.database import raw

_NAME = "copy"


def put(connection: Connection, store_id: str, place: str) -> None:
    """Mark a store as an unfinished copy. store_id, place: of the store that is copied."""
    statement = "INSERT INTO leases (name, holder, epoch, until) VALUES (%s, %s, 0, 0)"
    raw(connection).execute(statement, (_NAME, json.dumps([store_id, place])))


def find(connection: Connection) -> tuple[str, str] | None:
    """Return the identity and the place of the store that is being copied; None for a store that is whole."""
    row = raw(connection).execute("SELECT holder FROM leases WHERE name = %s", (_NAME,)).fetchone()
    if row is None:
        return None
    store_id, place = json.loads(row[0])
    return store_id, place


def remove(connection: Connection) -> None:
    """Let the store be served."""
    raw(connection).execute("DELETE FROM leases WHERE name = %s", (_NAME,))


def refuse(connection: Connection, title: str) -> None:
    """Refuse a store that is an unfinished copy. title: what it is called in the error. Errors: StartError."""
    if (found := find(connection)) is not None:
        text = f"{title} is an unfinished copy of {found[1]}; go on with: kvbank store copy"
        raise StartError(f"{text} {found[1]} {title}")
