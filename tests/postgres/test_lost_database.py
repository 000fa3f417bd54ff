"""A service whose database does not answer any more."""

from pathlib import Path

import psycopg
import pytest

from memory_service.storage.base import Retrievals
from tests.support.engines import ENGINES, opened
from tests.support.store import add, new_bank

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())


def shut(url: str) -> None:
    """End all connections to a database, which takes no new ones either."""
    name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    with psycopg.connect(psycopg.conninfo.make_conninfo(url, dbname="postgres"), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))


def test_a_service_stops_whose_database_does_not_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with KIND.place(tmp_path) as place, opened(place) as engine:
        bank, _ = engine.store.create_bank(new_bank())
        written = add(engine.store, bank, 1)
        engine.store.count({written.chunk_id: Retrievals(1, 1, 1)})
        shut(place["data"])
    assert "the counts of 1 chunks are lost" in caplog.text
