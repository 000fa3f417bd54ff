"""SIGKILL at any moment, again and again, while clients write, search and delete in a bank that is too small."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import kvbank
from tests.proof.content import EMBEDDING, KV
from tests.proof.journal import Journal, Promises
from tests.proof.load import LoadProcess
from tests.proof.verify import Verdict, verify
from tests.support.service_process import ServiceHost
from tests.support.waiting import wait_until

BANK = "b"
CAPACITY = kvbank.Capacity(chunks=400)


@dataclass
class Killed:
    """Sums over all kills; `lost` and `wrong` as in Verdict. `verified`: chunks read back and compared."""

    kills: int = 0
    acknowledged: int = 0
    verified: int = 0
    evicted: int = 0
    deleted: int = 0
    lost: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.acknowledged, self.evicted, self.deleted = verdict.acknowledged, verdict.evicted, verdict.deleted
        self.verified += verdict.verified
        self.lost += verdict.lost
        self.wrong += verdict.wrong

    def __str__(self) -> str:
        counts = ("kills", "acknowledged", "verified", "evicted", "deleted")
        words = [f"{name} {getattr(self, name)}" for name in counts]
        return ", ".join([*words, f"lost {len(self.lost)}", f"wrong {len(self.wrong)}"])


def kill_often(
    host: ServiceHost,
    place: Path,
    kills: int,
    seed: int,
    *,
    clients: int = 4,
    longest: float = 0.5,
    tell: Callable[[Killed], None] = lambda _: None,
) -> Killed:
    """Kill up to `longest` seconds after a first acknowledgement, verify after each restart; the last stop is clean.

    In every other life of the service the clients stage their files. tell: called after each restart.
    """
    choose, killed, promises = random.Random(seed), Killed(), Promises(BANK)
    journals = [Journal(place / f"journal-{number}") for number in range(clients)]
    workers = [LoadProcess(place / f"journal-{number}", BANK, seed + number) for number in range(clients)]
    service = host.start(place / "data")
    with kvbank.connect(service.address) as client:
        client.create_bank(BANK, kv=KV, embedding=EMBEDDING, capacity=CAPACITY)
    promises.exists = True
    for number in range(kills + 1):
        last = number == kills
        for worker in workers:
            worker.work(service.address, 30 if last else 10**9)
        if not last:
            wait_until(lambda: any(journal.waits() for journal in journals), "no client is told anything")
            time.sleep(choose.uniform(0, longest))
            service.kill()
            killed.kills += 1
        for worker in workers:
            worker.wait()
        if last:
            assert service.stop() == 0, service.log()
        for journal in journals:
            for event in journal.news():
                promises.hear(event)
        service = host.start(place / "data", **({"same_host": True} if number % 2 else {}))
        with kvbank.connect(service.address) as client:
            killed.add(verify(client, promises))
            left = {chunk.chunk_id for chunk in client.list_chunks(BANK)}
        tell(killed)
    for worker in workers:
        worker.close()
    service.stop()
    files = {path.name for path in (place / "data/payloads").glob("*/*/*")}
    killed.wrong += [f"file {name} of no chunk" for name in files - {f"{chunk_id}.safetensors" for chunk_id in left}]
    return killed
