"""The peer qdrant-client, in its local mode, as a durable store of small records (id, text, vector).

Argument: scratch folder.
"""

import sys
from itertools import count

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

from benchmarks import material
from benchmarks.lines import serve


def main(folder: str) -> None:
    """Make an empty collection in the folder, then write records until stdin closes."""
    client = QdrantClient(path=f"{folder}/qdrant")
    client.create_collection("records", VectorParams(size=material.DIMENSION, distance=Distance.DOT))
    serial = count()
    found = material.vectors(1000)

    def record(number: int) -> PointStruct:
        return PointStruct(id=number, vector=found[number % len(found)].tolist(), payload={"text": material.TEXT})

    def single(records: int) -> None:
        for _ in range(records):
            client.upsert("records", [record(next(serial))])

    def batch(records: int) -> None:
        client.upsert("records", [record(next(serial)) for _ in range(records)])

    serve({"single": single, "batch": batch})
    client.close()


if __name__ == "__main__":
    main(sys.argv[1])
