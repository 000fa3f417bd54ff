"""Databases of earlier revisions are upgraded with all that they hold, and never served as they are."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest

from kvbank.commands import application
from memory_service.domain.errors import StartError
from memory_service.storage import revisions
from memory_service.storage.postgres import revising
from memory_service.storage.postgres.database import Database
from tests.support import command, postgres
from tests.support.engines import ENGINES, opened
from tests.support.store import add, fill, held, new_bank

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
LAST = revisions.names(revising.FOLDER)[-1]
_SHAPE = """
    SELECT format('%s %s %s %s %s %s', table_name, ordinal_position, column_name, data_type, is_nullable,
        coalesce(column_default, is_identity) || coalesce(collation_name, '')) FROM information_schema.columns
        WHERE table_schema = 'public'
    UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL SELECT conrelid::regclass || pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid <> 0
        AND connamespace = 'public'::regnamespace
    UNION ALL SELECT relname || coalesce(reloptions::text, '') || coalesce(pg_get_expr(relpartbound, oid), '')
        FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
    UNION ALL SELECT attrelid::regclass || attstorage::text FROM pg_attribute WHERE attname = 'embedding'
    UNION ALL SELECT format('%s %s %s %s', tablename, policyname, qual, with_check) FROM pg_policies
    UNION ALL SELECT relname FROM pg_class WHERE relrowsecurity
    UNION ALL SELECT format('%s %s %s', sequencename, increment_by, start_value) FROM pg_sequences
"""
_COLUMNS = """
    SELECT table_name, string_agg(quote_ident(column_name), ', ') FROM information_schema.columns
    JOIN information_schema.tables USING (table_schema, table_name) WHERE table_schema = 'public'
    AND table_type = 'BASE TABLE' AND table_name NOT LIKE 'chunks\\___' GROUP BY table_name
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    with KIND.place(tmp_path) as made:
        yield made


def to_first(url: str, like: str = "") -> None:
    """Make a database of the first version, which noted no revision. like: the database whose rows it gets."""
    database = Database(url)
    database.change(lambda connection: revisions.run(revising.FOLDER, connection, "0001"))
    database.change(lambda connection: connection.exec_driver_sql("DROP TABLE alembic_version"))
    database.close()
    if like:
        with psycopg.connect(like) as there, psycopg.connect(url) as here:
            for table, names in here.execute(_COLUMNS).fetchall():
                here.execute(f"DELETE FROM {table}")
                with (
                    there.cursor().copy(f"COPY (SELECT {names} FROM {table}) TO STDOUT") as out,
                    here.cursor().copy(f"COPY {table} ({names}) FROM STDIN") as into,
                ):
                    for rows in out:
                        into.write(rows)
            here.execute("UPDATE store SET version = 1")
            for name in ("chunk_ids", "bank_ids"):
                here.execute(f"SELECT setval('{name}', 1000000)")


def shape(url: str) -> list[str]:
    with psycopg.connect(url) as connection:
        return sorted(row for (row,) in connection.execute(_SHAPE))


def upgraded(url: str, **options: Any) -> revising.Revised:
    database = Database(url)
    try:
        return revising.opened(database, migrate=True, **options)
    finally:
        database.close()


def test_upgraded_tables_equal_fresh_ones(place: Mapping[str, Any]) -> None:
    with postgres.database(empty=True) as url:
        to_first(url)
        assert upgraded(url) == revising.Revised("0001", LAST)
        assert upgraded(url) == revising.Revised(LAST, LAST)
        assert shape(url) == shape(place["data"])


def test_a_database_of_the_first_version_is_upgraded_with_all_that_it_holds(place: Mapping[str, Any]) -> None:
    with opened(place) as engine:
        bank, _ = engine.store.create_bank(new_bank())
        ids = fill(engine.store, bank, range(3))
    with postgres.database(empty=True) as url:
        to_first(url, like=place["data"])
        older = {**place, "data": url}
        told = "has the older schema 0001; upgrade it with: kvbank migrate --data '?postgresql://"
        with pytest.raises(StartError, match=told), opened(older):
            pass
        with opened(older, migrate=True) as engine:
            assert held(engine.store, bank) == ids
            assert add(engine.store, bank, 7).chunk_id > max(ids)


def test_the_command_says_what_it_has_done(tmp_path: Path) -> None:
    with postgres.database(empty=True) as url:
        to_first(url)
        assert json.loads(command.run(application(), "migrate", "--data", url, "--json").stdout)["found"] == "0001"
        assert command.run(application(), "migrate", "--data", url).stdout.endswith(f" has the schema {LAST} already\n")
    with postgres.database(empty=True) as url:
        assert command.run(application(), "migrate", "--data", url).stdout.endswith(f": schema {LAST}, was empty\n")
    ended = command.run(application(), "migrate", "--data", tmp_path)
    assert ended == (1, "", f"kvbank: {tmp_path} is not a data folder of kvbank: it has no metadata.db\n")
    ended = command.run(application(), "migrate", "--data", "postgresql://me:secret@127.0.0.1:1/none")
    assert ended[:2] == (1, "")
    assert "secret" not in ended[2]
    assert ended[2].count("\n") == 1
    ended = command.run(application(), "migrate", "--data", "postgresql://me:sec:ret@host:port/none")
    assert ended.stderr.startswith("kvbank: the URL of the database cannot be read")
    assert "ret@" not in ended.stderr


def test_a_database_of_a_newer_version_is_refused_with_the_command_to_run(place: Mapping[str, Any]) -> None:
    with psycopg.connect(place["data"], autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    told = rf"was written by a newer kvbank \(schema 9999, this one knows {LAST}\); .*pip install --upgrade kvbank"
    with pytest.raises(StartError, match=told), opened(place, migrate=True):
        pass


def test_an_upgrade_waits_no_longer_than_that_for_a_table_that_is_in_use() -> None:
    with postgres.database(empty=True) as url:
        to_first(url)
        with psycopg.connect(url) as long:
            long.execute("UPDATE store SET version = 1")
            with pytest.raises(StartError, match="nothing was changed, try again later"):
                upgraded(url, patience_s=0.01)
        assert upgraded(url).found == "0001"
