"""Many conversations at once over two workers that take turns, whatever they said before."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import kvbank
from tests.proof.chats import MODEL, Talker, wrong
from tests.proof.handshakes import free_address
from tests.support.service_process import ServiceHost
from tests.support.worker_process import WorkerHost
from tests.worker_http.conftest import save_lasting_model

# The slowest conversation gets at least so much of the mean.
LEAST_SHARE = 0.5


@dataclass
class Crowd:
    """What a crowd was answered. least: answers of the slowest conversation, as a share of the mean. usual, slowest:
    seconds of the median and of the longest answer."""

    conversations: int
    seconds: float
    asked: Counter[str]
    least: float
    usual: float
    slowest: float
    wrong: list[str]

    @property
    def holds(self) -> bool:
        return not self.wrong and self.least >= LEAST_SHARE

    def __str__(self) -> str:
        answers, tokens = self.asked["answers"], self.asked["tokens"]
        other = ", ".join(f"{self.asked[name]} {text}" for name, text in OTHER.items())
        return (
            f"{self.conversations} conversations, {answers} answers, {tokens / self.seconds:.0f} tokens/s, {other}; "
            f"half of the answers within {self.usual:.1f} s, all within {self.slowest:.1f} s, "
            f"slowest conversation {self.least:.2f} of the mean; "
            f"wrong {len(self.wrong)}"
        )


OTHER = {"409": "times 409", "429": "times 429", "503": "times 503", "retries": "retries"}


def crowd(services: ServiceHost, place: Path, seconds: float, conversations: int = 20) -> Crowd:
    """Let so many conversations go on side by side for some time, and compare what they heard with the service."""
    model = save_lasting_model(place / "model")
    service = services.start(place / "data", listen=free_address())
    with WorkerHost() as host:
        flags = {"name": MODEL, "window": 128, "running": 8, "waiting": 64}
        workers = [host.work(model, service.address, **flags) for _ in range(2)]
        urls = [f"http://{worker.address}" for worker in workers]
        talkers = [Talker(f"s{number}", urls, seed=number, first=number % 2) for number in range(conversations)]
        begun = time.monotonic()

        def talk(talker: Talker) -> None:
            while time.monotonic() - begun < seconds:
                talker.say()

        with ThreadPoolExecutor(conversations) as threads:
            broken = [
                str(each.exception()) for each in [threads.submit(talk, one) for one in talkers] if each.exception()
            ]
        took = time.monotonic() - begun
        for worker in workers:
            worker.stop()
    with kvbank.connect(service.address) as client:
        found = [*broken, *wrong(client, talkers)]
    service.stop()
    answers = [talker.asked["answers"] for talker in talkers]
    asked = sum((talker.asked for talker in talkers), Counter[str]())
    least = min(answers) * len(answers) / max(1, sum(answers))
    waits = [wait for talker in talkers for wait in talker.waits]
    return Crowd(conversations, took, asked, least, median(waits), max(waits), found)
