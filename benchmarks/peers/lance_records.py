"""The peer LanceDB as a durable store of small records (id, text, vector) without an index.

Argument: scratch folder.
"""

import sys
from itertools import count
from typing import Any

import lancedb
import pyarrow

from benchmarks import material
from benchmarks.lines import serve


def main(folder: str) -> None:
    """Make an empty table in the folder, then write records until stdin closes."""
    vector = pyarrow.list_(pyarrow.float32(), material.DIMENSION)
    schema = pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.string()), ("vector", vector)])
    table: Any = lancedb.connect(f"{folder}/lance").create_table("records", schema=schema)
    serial = count()
    found = material.vectors(1000)

    def record(number: int) -> dict[str, Any]:
        return {"id": number, "text": material.TEXT, "vector": found[number % len(found)]}

    def single(records: int) -> None:
        for _ in range(records):
            table.add([record(next(serial))])

    def batch(records: int) -> None:
        table.add([record(next(serial)) for _ in range(records)])

    serve({"single": single, "batch": batch})


if __name__ == "__main__":
    main(sys.argv[1])
