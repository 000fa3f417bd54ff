"""Eight worker processes on one bank, at half of what they can do: how even the service answers, and whether it counts.

    python -m tests.proof.workers ADDRESSES BANK SEED

is one of them, and spreads its calls over several addresses. It reads lines `RATE SECONDS` (operations a second, 0: as
many as it can) and answers with JSON.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import kvbank
from kvbank.v1 import service_pb2
from tests.proof.content import DIGESTS, EMBEDDING, KV, chunk_of, new_key, vector_of
from tests.proof.handshakes import free_address
from tests.proof.once import Once
from tests.support.engines import ENGINES
from tests.support.service_process import ROOT, Service, ServiceHost

BANK = "shared"
WORKERS = 8
FIRST_CHUNKS = 2000
# Of the operations; the others search.
WRITES = 0.2


@dataclass
class Paced:
    """Latencies in ms from the moment at which an operation was due; `counted` by the store, `hits` by the workers.

    loads: the calls of each service while it was paced.
    """

    capacity: float = 0.0
    rate: float = 0.0
    operations: int = 0
    errors: list[str] = field(default_factory=list)
    quantiles: dict[str, tuple[float, float]] = field(default_factory=dict)
    hits: int = 0
    counted: int = 0
    written: int = 0
    stored: int = 0
    loads: list[int] = field(default_factory=list)

    @property
    def spread(self) -> float:
        """Return by how much the busiest service had more calls than the others, at most: 0.1 is a tenth."""
        return max(self.loads) / min(self.loads) - 1 if min(self.loads) else float("inf")

    @property
    def exact(self) -> bool:
        return (self.hits, self.written) == (self.counted, self.stored)

    def __str__(self) -> str:
        latencies = "; ".join(
            f"{kind} p50 {p50:.1f} ms, p99 {p99:.1f} ms ({p99 / p50:.1f}x)"
            for kind, (p50, p99) in self.quantiles.items()
        )
        return (
            f"capacity {self.capacity:.0f}/s, paced at {self.rate:.0f}/s: {self.operations} operations, "
            f"{len(self.errors)} errors; {latencies}; hits {self.hits}, counted {self.counted}; "
            f"written {self.written}, stored {self.stored}; calls of each service {self.loads}"
        )


def paced(host: ServiceHost, place: Path, seconds: float, *, warm: float = 5.0) -> Paced:
    """Measure the capacity of a service for `warm` seconds, then work at half of it for `seconds`."""
    return _paced([host.start(place / "data")], seconds, warm)


def paced_together(host: ServiceHost, place: Path, seconds: float, *, warm: float = 5.0, count: int = 2) -> Paced:
    """Do the same with several services on one database."""
    with ENGINES["postgres"].place(place) as where:
        own = ({"cache": f"{where['cache']}-{number}", "listen": free_address()} for number in range(count))
        return _paced([host.start(**{**where, **each}) for each in own], seconds, warm)


def _paced(services: Sequence[Service], seconds: float, warm: float) -> Paced:
    report, addresses = Paced(), ",".join(service.address for service in services)
    with kvbank.connect(addresses) as client:
        client.create_bank(BANK, kv=KV, embedding=EMBEDDING)
        client.write_many(BANK, (chunk_of(new_key(tokens=8)) for _ in range(FIRST_CHUNKS)), **DIGESTS)
    workers = [_start(addresses, seed) for seed in range(WORKERS)]
    _all(workers, 0, 1.0, report)  # connections, the index
    report.capacity = sum(len(done) for done in _all(workers, 0, warm, report).values()) / warm
    report.rate = report.capacity / 2
    before = list(map(_calls, services))
    latencies = _all(workers, report.rate / WORKERS, seconds, report)
    report.loads = [after - begin for begin, after in zip(before, map(_calls, services), strict=True)]
    report.operations = sum(map(len, latencies.values()))
    for kind, values in latencies.items():
        report.quantiles[kind] = (float(np.percentile(values, 50)), float(np.percentile(values, 99)))
    for worker in workers:
        worker.communicate()
    for service in services:  # each of which writes what it has counted before it lists
        with kvbank.connect(service.address) as client:
            report.stored = client.get_bank(BANK).usage.chunks_written - FIRST_CHUNKS
            report.counted = sum(chunk.retrieval_count for chunk in client.list_chunks(BANK))
    for service in services:
        service.stop()
    return report


def _calls(service: Service) -> int:
    """Return how many calls of the workers' methods a service has had."""
    with Once(service.address) as client:
        samples = client.stub.GetStats(service_pb2.GetStatsRequest()).samples
    counted = (each for each in samples if each.name == "kvbank_request_seconds_count")
    return int(sum(each.value for each in counted if each.labels["method"] in ("Retrieve", "WriteChunks")))


def _start(address: str, seed: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.proof.workers", address, BANK, str(seed)]
    spread = os.environ | {"KVBANK_SPREAD": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=spread)


def _all(
    workers: Sequence["subprocess.Popen[str]"], rate: float, seconds: float, report: Paced
) -> dict[str, list[float]]:
    """Latencies by kind of operation."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{rate} {seconds}\n")
        worker.stdin.flush()
    latencies: dict[str, list[float]] = {"write": [], "search": []}
    for worker in workers:
        assert worker.stdout is not None
        answer = json.loads(worker.stdout.readline())
        report.hits += answer["hits"]
        report.written += answer["written"]
        report.errors += answer["errors"]
        for kind, values in answer["latencies"].items():
            latencies[kind] += values
    return latencies


def _work(client: kvbank.Client, bank: str, choose: random.Random, rate: float, seconds: float) -> dict[str, Any]:
    answer: dict[str, Any] = {"hits": 0, "written": 0, "errors": [], "latencies": {"write": [], "search": []}}
    begin = time.monotonic() + (choose.random() / rate if rate else 0)
    number = 0
    while time.monotonic() < begin + seconds:
        kind = "write" if choose.random() < WRITES else "search"
        chunk, query = chunk_of(new_key(tokens=8)), vector_of(new_key())
        due = begin + number / rate if rate else time.monotonic()
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            if kind == "write":
                client.write(bank, chunk, **DIGESTS)
                answer["written"] += 1
            else:
                answer["hits"] += len(client.retrieve(bank, query, top_k=4, **DIGESTS).queries[0])
        except kvbank.KVBankError as error:
            answer["errors"].append(repr(error))
        answer["latencies"][kind].append((time.monotonic() - due) * 1000)
        number += 1
    return answer


def main(address: str, bank: str, seed: str) -> None:
    choose = random.Random(int(seed))
    with kvbank.connect(address) as client:
        for line in sys.stdin:
            rate, seconds = map(float, line.split())
            print(json.dumps(_work(client, bank, choose, rate, seconds)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
