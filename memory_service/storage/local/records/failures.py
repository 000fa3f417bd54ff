"""What the errors of SQLite mean to a caller. They come as those of SQLAlchemy and as those of the driver, because hot
statements go to the driver without SQLAlchemy in between.
"""

import sqlite3

from memory_service.domain.errors import ServiceError, broken_off, disk_full, refusal_for
from memory_service.storage import driver_errors

_INTERRUPT, _FULL = 9, 13


def register() -> None:
    """Let `refusal_for` know the errors of the database. A second call does nothing."""
    driver_errors.register()
    refusal_for.register(sqlite3.Error, from_database_error)


def from_database_error(error: sqlite3.Error) -> ServiceError:
    """Return what a caller is told of an error of the database. A statement is interrupted where its caller has gone
    (`domain.cancellation`)."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code == _INTERRUPT:
        return broken_off()
    if code & 0xFF == _FULL:
        return disk_full()
    name = getattr(error, "sqlite_errorname", "unknown")
    return ServiceError("STORAGE_ERROR", f"the database answered with an error ({name})", errno=name)
