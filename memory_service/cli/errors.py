"""What the server's commands say of errors of the server's parts; `kvbank.console.ending` says what is wrong in every
other case."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from kvbank.console.ending import Failed
from memory_service.domain.errors import StartError


@contextmanager
def told() -> Iterator[None]:
    """Let an error of a start, of the care of a folder, or of the database, end the command in one line."""
    from sqlalchemy.exc import DBAPIError

    from memory_service.care.report import CareError

    try:
        yield
    except (CareError, StartError) as error:
        raise Failed(str(error)) from error
    except DBAPIError as error:
        raise Failed(f"the database answered: {error.orig}") from error
    except sqlite3.Error as error:
        raise Failed(f"the database answered: {error}") from error
