"""The peer milvus-lite as a durable store of small records (id, text, vector) with a FLAT index.

Argument: scratch folder.
"""

import sys
from itertools import count
from typing import Any

from pymilvus import MilvusClient

from benchmarks import material
from benchmarks.lines import serve


def main(folder: str) -> None:
    """Make an empty collection in a file of the folder, then write records until stdin closes."""
    client: Any = MilvusClient(f"{folder}/milvus.db")
    client.create_collection("records", dimension=material.DIMENSION, metric_type="IP", id_type="int", auto_id=False)
    serial = count()
    found = material.vectors(1000)

    def record(number: int) -> dict[str, Any]:
        return {"id": number, "vector": found[number % len(found)].tolist(), "text": material.TEXT}

    def single(records: int) -> None:
        for _ in range(records):
            client.insert("records", [record(next(serial))])

    def batch(records: int) -> None:
        client.insert("records", [record(next(serial)) for _ in range(records)])

    serve({"single": single, "batch": batch})
    client.close()


if __name__ == "__main__":
    main(sys.argv[1])
