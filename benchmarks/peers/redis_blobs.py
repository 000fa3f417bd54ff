"""The peer Redis as a store of blobs in memory: it puts and gets them one by one. Argument: scratch folder."""

import sys

from benchmarks.lines import serve
from benchmarks.peers.redis_server import running


def main(folder: str) -> None:
    """Start an empty Redis, then put and get blobs until stdin closes."""
    with running(folder, append_only=False) as client:

        def put(count: int, size: int) -> None:
            for number in range(count):
                client.set(str(number), bytes([number % 256]) * size)

        def get(number: int, size: int) -> None:
            found = client.get(str(number))
            assert found is not None
            assert len(found) == size

        serve({"put": put, "get": get})


if __name__ == "__main__":
    main(sys.argv[1])
