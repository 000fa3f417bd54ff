"""The revision of the tables of a database. This file owns that only the present one is served, that services which
begin on an empty database together make its tables once, and that an upgrade is one transaction: what it locks, it
locks to its end, so that a migration which rewrites the rows of a large table would need a way of its own.

Services of the revision before go on while the tables are upgraded, and after it: a migration adds what they do not
mind, and takes away what no service of the revision before uses.
"""

import shlex
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psycopg
import sqlalchemy as sa
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from memory_service.domain.errors import StartError
from memory_service.storage import revisions
from memory_service.storage.postgres import failures, schema
from memory_service.storage.postgres.database import Database

FOLDER = Path(__file__).parent / "migrations"
# The key of the lock (pg_advisory_xact_lock) of who makes or upgrades the tables.
_LOCK = 0x6B76_0001
# An upgrade waits so long, in seconds, for a table that a transaction uses: all others wait behind it.
_PATIENCE_S = 10.0
_NOTES = """
    CREATE TABLE alembic_version (
        version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
    )
"""


class Revised(NamedTuple):
    """The revision that was found, None for an empty database, and the one that the tables have now."""

    found: str | None
    now: str


def opened(database: Database, *, migrate: bool, patience_s: float = _PATIENCE_S) -> Revised:
    """Make the tables of an empty database, or check the revision of those that are there.

    migrate: whether older ones are upgraded. patience_s: how long an upgrade waits for others to end with a table.
    Errors: StartError, which says in one line what to do.
    """
    place = database.title
    try:
        revised = database.change(partial(_prepare, place=place, migrate=migrate, patience_s=patience_s))
    except (psycopg.Error, DBAPIError) as error:
        driver = failures.of_driver(error)
        if isinstance(driver, LockNotAvailable):
            text = "a transaction that takes long uses the tables; nothing was changed, try again later"
            raise StartError(f"cannot upgrade {place}: {text}") from error
        said = str(driver).strip().splitlines()
        raise StartError(f"cannot open {place}: {said[0] if said else 'no answer'}") from error
    database.renew()
    return revised


def _prepare(connection: Connection, *, place: str, migrate: bool, patience_s: float) -> Revised:
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
    found, known = find(connection), revisions.names(FOLDER)
    if found is None:
        schema.create(connection)
        _note(connection, known[-1])
    elif found not in known:
        raise StartError(
            f"{place} was written by a newer kvbank (schema {found}, this one knows {known[-1]});"
            " install that one here: pip install --upgrade kvbank"
        )
    elif found != known[-1]:
        if not migrate:
            text = f"upgrade it with: kvbank migrate --data {shlex.quote(place)}"
            raise StartError(f"{place} has the older schema {found}; {text}")
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(patience_s * 1000)}")
        _upgrade(connection, found)
    return Revised(found, known[-1])


def find(connection: Connection) -> str | None:
    """Return the revision of the tables; None where there are none."""
    tables = sa.inspect(connection)
    if tables.has_table("alembic_version"):
        return str(connection.scalar(sa.text("SELECT version_num FROM alembic_version")))
    # The version that made the tables before there were revisions.
    return revisions.names(FOLDER)[0] if tables.has_table("store") else None


def _upgrade(connection: Connection, found: str) -> None:
    if not sa.inspect(connection).has_table("alembic_version"):
        _note(connection, found)
    revisions.run(FOLDER, connection)


def _note(connection: Connection, revision: str) -> None:
    """Note a revision as Alembic does, where none was noted."""
    connection.exec_driver_sql(_NOTES)
    connection.exec_driver_sql("INSERT INTO alembic_version VALUES (%s)", (revision,))
