"""What calls cost others: the memory of the service, and how long another caller waits meanwhile."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import grpc

from kvbank.v1 import service_pb2 as pb
from kvbank.v1 import service_pb2_grpc
from tests.support.service_process import Service

# Between two questions of the one who waits.
PAUSE_S = 0.002


# What a message may cost, on a machine that may be busy: what the bounds guard against took seconds.
ROOM_BYTES, WAIT_S = 64 << 20, 2.0


@dataclass(frozen=True)
class Cost:
    """The cost of a message. peak: bytes of memory on top of what there was before. stays: those of them that are there
    afterwards. waited: seconds of the longest call of another caller, over a connection of its own."""

    peak: int
    stays: int
    waited: float

    def within(self, size: int) -> bool:
        """Tell whether this is what a message of so many bytes may cost. gRPC has the message up to three times: as it
        came, as one piece, and as Python's bytes."""
        return self.peak < 4 * size + ROOM_BYTES and self.waited < WAIT_S


class Another:
    """A caller who asks for GetServerInfo again and again."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._ask = service_pb2_grpc.MemoryServiceStub(self._channel).GetServerInfo
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest, self.asked, self.failed = 0.0, 0, ""

    def _run(self) -> None:
        while not self._ended.wait(PAUSE_S):
            begun = time.monotonic()
            try:
                self._ask(pb.GetServerInfoRequest(), timeout=120)
            except grpc.RpcError as error:
                self.failed = f"{error.code()} {error.details()}"
            self.longest = max(self.longest, time.monotonic() - begun)
            self.asked += 1

    def __enter__(self) -> "Another":
        self._ask(pb.GetServerInfoRequest(), timeout=120)  # connects
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._channel.close()


def cost_of(service: Service, call: Callable[[], object], times: int = 1) -> Cost:
    """Make a call some times, one after the other."""
    before = service.resident_bytes()
    service.forget_peak()
    with Another(service.address) as another:
        for _ in range(times):
            call()
    assert not another.failed, another.failed
    return Cost(service.peak_bytes() - before, service.resident_bytes() - before, another.longest)
