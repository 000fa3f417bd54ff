"""Everything fails around services on one database, again and again, while clients write, search and delete: what was
acknowledged must be there, once, and nothing else."""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import OBJECTS, STANDARD
from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.layout import chunk_of
from memory_service.storage.s3.location import parse
from tests.proof.cluster import Cluster
from tests.proof.cluster_faults import FAULTS
from tests.proof.content import EMBEDDING, KV
from tests.proof.journal import Journal, Promises
from tests.proof.load import LoadProcess
from tests.proof.verify import Verdict, verify
from tests.support.service_process import ServiceHost
from tests.support.waiting import wait_until

BANK = "b"
CAPACITY = kvbank.Capacity(chunks=150)
OPERATIONS = 12
# Seconds after a first acknowledgement at which a fault comes, and for which it lasts, at most.
LATEST_S, LONGEST_S = 0.5, 1.0
# What was left of calls that nobody waits for any more has ended by then.
SETTLED_S = 5.0
# Both graces of objects without a row, once no service writes.
GRACE_S = 1.0
_SWEEPING = replace(STANDARD, objects=replace(OBJECTS, orphan_s=GRACE_S, sweep_s=GRACE_S / 4))


@dataclass
class Survived:
    """Sums over all rounds; `lost` and `wrong` as in Verdict.

    faults: how often each came. seen: what clients were told, by fault, error and reason. verified: chunks read back
    and compared. orphans: objects without a row when the services had stopped, and how many were left after two graces.
    """

    balancer: str = ""
    rounds: int = 0
    acknowledged: int = 0
    verified: int = 0
    evicted: int = 0
    deleted: int = 0
    lost: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    twice: set[int] = field(default_factory=set)
    orphans: tuple[int, int] = (0, 0)
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    @property
    def holds(self) -> bool:
        return not self.lost and not self.wrong and not self.twice and not self.orphans[1]

    def add(self, verdict: Verdict) -> None:
        self.acknowledged, self.evicted, self.deleted = verdict.acknowledged, verdict.evicted, verdict.deleted
        self.verified += verdict.verified
        self.lost += verdict.lost
        self.wrong += verdict.wrong

    def lines(self) -> Iterator[str]:
        """Yield a line for each kind of fault that came: how often, and what clients were told."""
        for fault, times in self.faults.items():
            told = Counter({" ".join(rest): count for (name, *rest), count in self.seen.items() if name == fault})
            said = ", ".join(f"{count} x {error.strip()}" for error, count in told.items())
            yield f"{fault}, {times} times: clients saw {said or 'nothing'}"

    def __str__(self) -> str:
        counts = ("rounds", "acknowledged", "verified", "evicted", "deleted")
        words = [f"{name} {getattr(self, name)}" for name in counts]
        words += [f"lost {len(self.lost)}", f"wrong {len(self.wrong)}", f"ids given twice {len(self.twice)}"]
        words += ["orphans {} before two graces, {} after".format(*self.orphans)]
        return ", ".join([*words, f"balanced by {self.balancer or 'nothing'} and by the SDK"])


def torment(
    host: ServiceHost,
    place: Path,
    rounds: int,
    seed: int,
    *,
    clients: int = 4,
    faults: tuple[str, ...] = tuple(FAULTS),
    tell: Callable[[Survived], None] = lambda _: None,
) -> Survived:
    """Do so many rounds, each with one of the faults, and verify behind each; all faults come before one comes again.

    tell: called after each round.
    """
    choose, survived, promises = random.Random(seed), Survived(), Promises(BANK)
    journals = [Journal(place / f"journal-{number}") for number in range(clients)]
    with Cluster(host, place) as cluster:
        survived.balancer = cluster.balancer
        direct = ",".join(cluster.addresses)
        with kvbank.connect(direct, spread=True) as client:
            client.create_bank(BANK, kv=KV, embedding=EMBEDDING, capacity=CAPACITY)
        promises.exists = True
        with _loads(place, clients, seed) as workers:
            for fault in _sequence(faults, rounds, choose):
                for number, worker in enumerate(workers):
                    worker.work(cluster.targets[number % len(cluster.targets)], OPERATIONS)
                wait_until(lambda: any(journal.waits() for journal in journals), "no client is told anything")
                time.sleep(choose.uniform(0, LATEST_S))
                with FAULTS[fault](cluster, choose):
                    time.sleep(choose.uniform(0, LONGEST_S))
                for worker in workers:
                    worker.wait()
                survived.rounds += 1
                survived.faults[fault] += 1
                for event in (event for journal in journals for event in journal.news()):
                    promises.hear(event)
                    if event["event"] == "failed":
                        survived.seen[fault, event["error"], event["reason"]] += 1
                survived.add(_verified(direct, promises))
                survived.twice = promises.twice
                tell(survived)
        for service in cluster.services:
            assert service.stop() == 0, service.log()
        survived.orphans = _swept(cluster.place)
    return survived


def _sequence(faults: tuple[str, ...], rounds: int, choose: random.Random) -> Iterator[str]:
    left: list[str] = []
    for _ in range(rounds):
        left = left or choose.sample(faults, len(faults))
        yield left.pop()


@contextmanager
def _loads(place: Path, clients: int, seed: int) -> Iterator[list[LoadProcess]]:
    """Start clients, which spread their calls where they have several addresses."""
    spread = os.environ | {"KVBANK_SPREAD": "1"}
    with ExitStack() as stack:
        workers = []
        for number in range(clients):
            workers.append(LoadProcess(place / f"journal-{number}", BANK, seed + number, spread, steady=True))
            stack.callback(workers[-1].close)
        yield workers


def _verified(target: str, promises: Promises) -> Verdict:
    """Verify the bank at all services by turns. A call that its client has given up may still change something: what
    is wrong must be so a while later."""
    with kvbank.connect(target, spread=True) as client:
        verdict = verify(client, promises, ascending=False)
        if not verdict.holds:
            time.sleep(SETTLED_S)
            verdict = verify(client, promises, ascending=False)
        return verdict


def _swept(place: dict[str, Any]) -> tuple[int, int]:
    """Let a service sweep the bucket with short graces; return how many objects had no row before, and after."""
    objects = Bucket(parse(place["objects"]), OBJECTS, os.environ["AWS_ENDPOINT_URL"])

    def keys() -> set[int]:
        return {chunk_of(item.key)[1] for page in objects.pages("chunks") for item in page}

    with LocalServer(**place, limits=_SWEEPING) as server, kvbank.connect(server.address) as client:
        rows, before = {chunk.chunk_id for chunk in client.list_chunks(BANK)}, keys()
        with suppress(AssertionError):  # the report says what is left
            wait_until(lambda: keys() == rows, seconds=40 * GRACE_S)
        return len(before - rows), len(keys() ^ rows)
