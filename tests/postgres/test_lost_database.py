"""A service whose database does not answer any more."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

import kvbank
from kvbank._transport.retrying import STORAGE_ATTEMPTS
from memory_service.api.embedded import LocalServer
from memory_service.storage.base import Retrievals
from tests.support import postgres
from tests.support.engines import ENGINES, opened
from tests.support.store import add, new_bank
from tests.support.waiting import wait_until

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())


def shut(url: str, *, away: bool = True) -> None:
    """End all connections to a database, which takes no new ones either; or let it take some again."""
    name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    with psycopg.connect(postgres.of(url, postgres.OWNER), dbname="postgres", autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {not away}")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))


def test_a_service_stops_whose_database_does_not_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with KIND.place(tmp_path) as place, opened(place) as engine:
        bank, _ = engine.store.create_bank(new_bank())
        written = add(engine.store, bank, 1)
        engine.store.count({written.chunk_id: Retrievals(1, 1, 1)})
        shut(place["data"])
    assert "the counts of 1 chunks are lost" in caplog.text


def test_a_call_waits_for_a_database_that_is_away_for_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        KIND.place(tmp_path) as place,
        LocalServer(**place) as server,
        kvbank.connect(server.address) as client,
        ThreadPoolExecutor() as threads,
    ):
        client.create_bank("b", kv=None, embedding=kvbank.EmbeddingSpec("e", 4))
        shut(place["data"])
        chunk = kvbank.NewChunk([1, 0, 0, 0])
        writing = threads.submit(client.write, "b", chunk, reader_digest="", embedder_digest="e")
        try:
            wait_until(lambda: caplog.text.count("UNAVAILABLE STORAGE_ERROR") > STORAGE_ATTEMPTS or writing.done())
        finally:
            shut(place["data"], away=False)
        assert not writing.result(60).replayed
