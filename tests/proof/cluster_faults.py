"""What can go wrong around services on one database: a fault lasts as long as its block, and is mended at its end."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from tests.proof.cluster import Cluster
from tests.support.bucket import CUT, PAST, Fault

Happens = Callable[[Cluster, random.Random], AbstractContextManager[None]]
# Of the requests to the bucket while it fails.
FAILING = 0.3
# Of the connections that are cut at once, and the seconds between two cuts.
CUT_SHARE, BETWEEN_CUTS_S = 0.5, 0.1


@contextmanager
def _service_killed(cluster: Cluster, choose: random.Random) -> Iterator[None]:
    number = choose.randrange(len(cluster.services))
    cluster.services[number].kill()
    yield
    cluster.start(number)


@contextmanager
def _all_killed(cluster: Cluster, choose: random.Random) -> Iterator[None]:
    for service in cluster.services:
        service.kill()
    yield
    cluster.start_all()


@contextmanager
def _service_stopped(cluster: Cluster, choose: random.Random) -> Iterator[None]:
    number = choose.randrange(len(cluster.services))
    assert cluster.services[number].stop() == 0, cluster.services[number].log()
    yield
    cluster.start(number)


@contextmanager
def _killed_behind_an_object(cluster: Cluster, choose: random.Random) -> Iterator[None]:
    """Kill all services at the moment at which a chunk's object is about to be stored, and its row is not there."""
    stored = threading.Event()

    def answers(request: str) -> Fault:
        if request.startswith("PUT") and "/chunks/" in request:
            stored.set()
        return None

    with _bucket(cluster, answers):
        stored.wait(10)
        for service in cluster.services:
            service.kill()
        yield
    cluster.start_all()


@contextmanager
def _database_killed(cluster: Cluster, choose: random.Random) -> Iterator[None]:
    cluster.postgres.kill()
    yield
    cluster.postgres.start()


@contextmanager
def _clients_cut(cluster: Cluster, choose: random.Random) -> Iterator[None]:
    with _again_and_again(lambda: [door.cut(choose, CUT_SHARE) for door in cluster.doors]):
        yield


@contextmanager
def _database_cut(cluster: Cluster, choose: random.Random) -> Iterator[None]:
    with _again_and_again(lambda: cluster.to_database.cut(choose, CUT_SHARE)):
        yield


@contextmanager
def _again_and_again(act: Callable[[], object]) -> Iterator[None]:
    over = threading.Event()

    def run() -> None:
        act()
        while not over.wait(BETWEEN_CUTS_S):
            act()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _answering(fault: Fault, *methods: str) -> Happens:
    """Have the bucket answer some of the requests of these methods, or of all, with a fault."""

    @contextmanager
    def happens(cluster: Cluster, choose: random.Random) -> Iterator[None]:
        def answers(request: str) -> Fault:
            hit = not methods or request.startswith(methods)
            return fault if hit and choose.random() < FAILING else None

        with _bucket(cluster, answers):
            yield

    return happens


@contextmanager
def _slow(cluster: Cluster, choose: random.Random) -> Iterator[None]:
    def answers(_request: str) -> Fault:
        time.sleep(choose.uniform(0, 0.3))
        return None

    with _bucket(cluster, answers):
        yield


@contextmanager
def _bucket(cluster: Cluster, answers: Callable[[str], Fault]) -> Iterator[None]:
    well, cluster.bucket.answers = cluster.bucket.answers, answers
    try:
        yield
    finally:
        cluster.bucket.answers = well


FAULTS: Mapping[str, Happens] = {
    "a service is killed": _service_killed,
    "all services are killed": _all_killed,
    "all services are killed behind an object": _killed_behind_an_object,
    "a service is stopped": _service_stopped,
    "PostgreSQL is killed": _database_killed,
    "connections of clients are cut": _clients_cut,
    "connections to PostgreSQL are cut": _database_cut,
    "the bucket answers 500": _answering((500, "InternalError")),
    "the bucket answers 503": _answering((503, "SlowDown")),
    "the bucket answers 409": _answering((409, "ConditionalRequestConflict"), "PUT"),
    "the bucket is slow": _slow,
    "the bucket cuts bodies": _answering(CUT, "GET"),
    "the bucket's answers are lost": _answering(PAST),
}
