"""SIGKILL of a worker in the middle of a turn, and of the service in the middle of an append, while a client talks."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import kvbank
from model_worker.session.lease import LEASE_S
from tests.proof.chats import MODEL, Talker, wrong
from tests.proof.handshakes import free_address
from tests.support.service_process import Service, ServiceHost
from tests.support.worker_process import WorkerHost
from tests.worker_http.conftest import save_lasting_model

# Messages of a conversation, after which another one begins: what is sent grows with each.
_LONGEST = 12
# Seconds that a start of a service or worker takes at most, besides the time of a lease.
_START_S = 20.0


@dataclass
class ChatsKilled:
    """What came of the kills. slowest: the most seconds from a kill to the answer. again: kills after which a message
    was said again."""

    kills: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    again: int = 0
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.wrong and self.slowest < LEASE_S + _START_S

    def __str__(self) -> str:
        kills = ", ".join(f"{count} of a {what}" for what, count in sorted(self.kills.items()))
        return (
            f"kills {kills}; answers {self.answers}, after {self.again} kills a message was said again, "
            f"answered at most {self.slowest:.1f} s after the kill; wrong {len(self.wrong)}"
        )


class _World:
    """A service and two workers, which are started again after each kill."""

    def __init__(self, services: ServiceHost, host: WorkerHost, place: Path) -> None:
        self._services, self._host = services, host
        self._data, self._listen = place / "data", free_address()
        self._model = save_lasting_model(place / "model")
        self.service = self._serve()
        self.workers = [self._work() for _ in range(2)]

    def _serve(self) -> Service:
        return self._services.start(self._data, listen=self._listen)

    def _work(self) -> Service:
        return self._host.work(self._model, self.service.address, name=MODEL, window=128)

    @property
    def urls(self) -> list[str]:
        return [f"http://{worker.address}" for worker in self.workers]

    def kill_service(self) -> None:
        self.service.kill()
        self.service = self._serve()

    def kill_worker(self, number: int) -> None:
        self.workers[number].kill()

    def start_worker(self, number: int) -> None:
        self.workers[number] = self._work()

    def close(self) -> None:
        for process in (*self.workers, self.service):
            process.stop()


def kill_chats(
    services: ServiceHost, place: Path, kills: int, seed: int, tell: Callable[[ChatsKilled], None] = lambda _: None
) -> ChatsKilled:
    """Kill a worker or the service while a message is answered, and compare what was heard with the service. tell:
    called after each conversation."""
    choose, killed = random.Random(seed), ChatsKilled()
    with WorkerHost() as host:
        world = _World(services, host, place)
        talker = Talker("k0", world.urls, seed)
        usual = [_timed(talker.say) for _ in range(3)][-1]
        for number in range(kills):
            if len(talker.heard) >= _LONGEST:
                _compare(world, talker, killed)
                tell(killed)
                talker = Talker(f"k{number}", world.urls, seed + number)
                talker.say()
            _kill_once(world, talker, killed, choose.uniform(0, 1.2 * usual), service=bool(number % 2))
        _compare(world, talker, killed)
        world.close()
    return killed


def _kill_once(world: _World, talker: Talker, killed: ChatsKilled, after: float, *, service: bool) -> None:
    """Kill a while after a message was sent: the service, or the worker that has the message."""
    talker.move(world.urls)
    before, failed = talker.asked["retries"], list[BaseException]()

    def say() -> None:
        try:
            talker.say()
        except BaseException as error:
            failed.append(error)

    saying = threading.Thread(target=say)
    saying.start()
    time.sleep(after)
    begun = time.monotonic()
    killed.kills["service" if service else "worker"] += 1
    if service:
        world.kill_service()
    else:
        world.kill_worker(0)
    saying.join()
    killed.slowest = max(killed.slowest, time.monotonic() - begun)
    killed.again += talker.asked["retries"] > before
    killed.answers += 1
    killed.wrong += [f"{talker.name}: {type(error).__name__}: {error}" for error in failed]
    if not service:
        world.start_worker(0)


def _compare(world: _World, talker: Talker, killed: ChatsKilled) -> None:
    with kvbank.connect(world.service.address) as client:
        killed.wrong += wrong(client, [talker])


def _timed(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun
