"""The peer that one would build without this project: an exact search by FAISS in the process, then MGET of the hits'
K-V from Redis, over a unix socket or TCP. Nothing is hashed.

Arguments: scratch folder, number of vectors, number of clusters (the first ones) that have K-V, bytes of each K-V, and
1 for TCP, 0 for a unix socket.
"""

import sys

import faiss

from benchmarks import material
from benchmarks.lines import serve
from benchmarks.peers.redis_server import running

TOP_K = 8


def main(folder: str, count: int, with_kv: int, size: int, tcp: int) -> None:
    """Make an index and start a Redis, then answer queries until stdin closes."""
    found = material.vectors(count)
    faiss.omp_set_num_threads(1)  # with two on two busy cores it takes about four times as long
    index = faiss.IndexFlatIP(material.DIMENSION)
    index.add(found)
    clusters = len(found) // material.CLUSTER
    chosen = [number for number in range(count) if number % clusters < with_kv]
    queries = material.near(found[chosen], 256)
    with running(folder, append_only=False, tcp=bool(tcp)) as client:
        for number in chosen:
            client.set(str(number), bytes([number % 256]) * size)

        def retrieve(number: int) -> None:
            _, ids = index.search(queries[number % len(queries)][None], TOP_K)
            blobs = client.mget([str(hit) for hit in ids[0]])
            assert sum(len(blob) for blob in blobs) == TOP_K * size

        serve({"retrieve": retrieve})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
