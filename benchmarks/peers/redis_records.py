"""The peer Redis as a durable store of small records: hashes with text and embedding, `appendfsync always`, no search.

Argument: scratch folder.
"""

import sys
from itertools import count

from benchmarks import material
from benchmarks.lines import serve
from benchmarks.peers.redis_server import running


def main(folder: str) -> None:
    """Start an empty Redis, then write records until stdin closes."""
    serial = count()
    found = material.vectors(1000)
    with running(folder, append_only=True) as client:

        def record(number: int) -> dict[str, str | bytes]:
            return {"text": material.TEXT, "embedding": found[number % len(found)].tobytes()}

        def single(records: int) -> None:
            for _ in range(records):
                number = next(serial)
                client.hset(str(number), mapping=record(number))

        def batch(records: int) -> None:
            with client.pipeline(transaction=False) as pipeline:
                for _ in range(records):
                    number = next(serial)
                    pipeline.hset(str(number), mapping=record(number))
                pipeline.execute()

        serve({"single": single, "batch": batch})


if __name__ == "__main__":
    main(sys.argv[1])
