"""Where things are kept. This file owns the choice of an engine: what is above it knows only the protocols of
`memory_service.storage.base`."""

from collections.abc import Iterator
from contextlib import contextmanager

from memory_service.domain.clock import Clock
from memory_service.domain.errors import StartError
from memory_service.domain.limits import NO_PAUSES, STANDARD, Limits, Pauses
from memory_service.observe.metrics import Metrics
from memory_service.settings import Settings
from memory_service.storage.base import DerivedId, Engine
from memory_service.storage.local import engine as local

# Packages that only some users need, and the extras that bring them.
_EXTRAS = {"psycopg": "postgres", "obstore": "s3"}


def open_engine(
    settings: Settings,
    metrics: Metrics,
    derived_id: DerivedId,
    clock: Clock | None = None,
    *,
    limits: Limits = STANDARD,
    pauses: Pauses = NO_PAUSES,
) -> Engine:
    """Open the engine that the settings ask for: a data folder, which this process owns until the engine is closed, or
    a database with a bucket, which it shares.

    The caller tells the followers of the store, begins the engine, and at the end lets it rest and closes it. clock:
    the clock to go by, None for that of the machine. derived_id: where the records of a folder were lost, ids that are
    still known outside of them are not given again. Errors: StartError.
    """
    if not settings.in_database:
        if settings.objects:
            raise StartError("--objects is for data in a database; a data folder has its payloads itself")
        return local.LocalEngine(settings, metrics, derived_id, clock, limits, pauses)
    if not settings.objects:
        raise StartError("data in a database need a bucket for their payloads: --objects s3://BUCKET/PREFIX")
    with extras_named():
        from memory_service.storage.postgres.engine import PostgresEngine
    return PostgresEngine(settings, metrics, clock, limits, pauses)


def upgrade(settings: Settings) -> tuple[str | None, str]:
    """Upgrade the data of these settings without serving them; return the schema that they had, None for an empty
    database, and the one that they have now. Errors: StartError."""
    if not settings.in_database:
        with local.explaining(settings.folder):
            return local.upgrade(settings.folder)
    with extras_named():
        from memory_service.storage.postgres import revising
        from memory_service.storage.postgres.database import Database
    database = Database(settings.data)
    try:
        return revising.opened(database, migrate=True)
    finally:
        database.close()


@contextmanager
def extras_named() -> Iterator[None]:
    """Name the extra that brings a package which an import of the block lacks. Errors: StartError."""
    try:
        yield
    except ImportError as error:
        if (extra := _EXTRAS.get(error.name or "")) is None:
            raise
        raise StartError(f"data in a database need {error.name}: pip install 'kvbank[{extra}]'") from error


@contextmanager
def explaining(settings: Settings) -> Iterator[None]:
    """Let the block open parts of the data of these settings. Errors: StartError, which says in one line why that
    cannot be done."""
    if settings.in_database:
        yield
    else:
        with local.explaining(settings.folder):
            yield
