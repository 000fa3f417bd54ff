"""A caller in a process of its own, as a worker is one: it retrieves one chunk after the other from a bank, with pauses
in between. Arguments: the address of the service, the bank."""

import sys
import time
from itertools import cycle

import kvbank
from benchmarks import material
from benchmarks.growth.measuring import CHUNKS
from benchmarks.lines import serve
from benchmarks.service import EMBEDDER, READER


def _main(address: str, bank: str) -> None:
    asked = cycle(material.vectors(CHUNKS))
    with kvbank.connect(address, options=[("grpc.use_local_subchannel_pool", 1)]) as client:

        def run(seconds: float, pause: float) -> tuple[float, list[float]]:
            """Call for some seconds; return the processor time of this process, and the seconds of each call."""
            times, own, end = [], time.process_time(), time.monotonic() + seconds
            while (begin := time.monotonic()) < end:
                client.retrieve(bank, next(asked), top_k=1, reader_digest=READER, embedder_digest=EMBEDDER)
                times.append(time.monotonic() - begin)
                time.sleep(pause)
            return time.process_time() - own, times

        serve({"run": run})


if __name__ == "__main__":
    _main(*sys.argv[1:])
