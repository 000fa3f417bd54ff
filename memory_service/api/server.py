"""The server of a data folder: how its parts are put together, started and stopped. This file owns the order of a clean
shutdown: calls end before what they use."""

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc

from kvbank.files import private
from kvbank.v1 import access_pb2, service_pb2, session_pb2
from kvbank.wire import addresses
from memory_service.access import certificates
from memory_service.access.keys import Keys
from memory_service.access.rates import Rates
from memory_service.access.tenants import Tenants
from memory_service.access.tokens import Issuer, Tokens
from memory_service.access.verifier import Verifier
from memory_service.api import health, listen
from memory_service.api.access_service import AccessService
from memory_service.api.calls.admission import Admission
from memory_service.api.calls.awaited import Awaited
from memory_service.api.calls.handlers import handlers
from memory_service.api.calls.interceptor import Interceptor
from memory_service.api.calls.rate_turns import RateTurns
from memory_service.api.calls.running import Calls
from memory_service.api.calls.storage_threads import StorageThreads
from memory_service.api.file_descriptors import for_connections, raise_limit
from memory_service.api.health import Health
from memory_service.api.http_endpoint import Endpoint
from memory_service.api.local_socket import Call, DirectCalls
from memory_service.api.same_host import FORGOTTEN_S, SameHost
from memory_service.api.service import MemoryService
from memory_service.api.session_service import SessionService
from memory_service.api.tls.expiry import Expiry
from memory_service.api.tls.identity import Files
from memory_service.api.tls.serving import Tls
from memory_service.domain.clock import Clock
from memory_service.domain.errors import StartError
from memory_service.domain.limits import NO_PAUSES, STANDARD, Limits, Pauses
from memory_service.observe import logs
from memory_service.observe.audit import AuditLog
from memory_service.observe.metrics import Metrics
from memory_service.observe.observation import Observer
from memory_service.observe.process_memory import keep_memory, leave_imports_alone
from memory_service.observe.process_threads import take_short_turns
from memory_service.observe.troubles import Troubles
from memory_service.operations.banks import Banks
from memory_service.search import largest_id
from memory_service.settings import Settings, unknown_variables
from memory_service.storage.opening import explaining, open_engine

SERVICES = (
    service_pb2.DESCRIPTOR.services_by_name["MemoryService"],
    access_pb2.DESCRIPTOR.services_by_name["AccessService"],
    session_pb2.DESCRIPTOR.services_by_name["SessionService"],
)
MOST_STREAMS = 256
# Bytes of a call's metadata; a key, or another credential, has at most half of that.
MOST_METADATA = 16 * 1024
# Seconds for what gRPC still has to send when no call is left; callers that watch the health are left then.
_LAST_BYTES_S = 0.25
# Seconds that a storage thread gets for a step whose caller is gone.
_LAST_STEP_S = 10.0
# Milliseconds for which a client that has shown a certificate begins calls on one connection.
_LONGEST_CERTIFIED_MS = 3_600_000
_log = logging.getLogger(__name__)


class Server:
    """Serves a data folder from `start` to `stop`, in the event loop that has made it."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock | None = None,
        *,
        limits: Limits = STANDARD,
        pauses: Pauses = NO_PAUSES,
    ) -> None:
        """Open the data folder. A test hands in its own clock, limits and pauses. Errors: StartError."""
        logs.leave_out_callers_who_left()
        for line in unknown_variables():
            _log.warning("%s", line)
        listen.check(settings)
        listen.check_tokens(settings)
        self._settings = settings
        self._limits = limits
        self._metrics = Metrics()
        self._tls = _tls(settings, self._metrics.troubles)
        self._endpoint: Endpoint | None = None
        self._engine = open_engine(settings, self._metrics, largest_id, clock, limits=limits, pauses=pauses)
        with ExitStack() as opened:
            opened.callback(self._engine.close)
            with explaining(settings):
                staging = self._engine.objects.staging
                self.same_host = SameHost(settings.folder, staging) if settings.same_host and staging else None
            if self.same_host is not None:
                opened.callback(self.same_host.close)
            if settings.record:
                opened.callback(self._metrics.recorder.end)
                self._metrics.recorder.begin(Path(settings.record), self._engine.store.store_id, settings.min_free)
            self._audit = AuditLog(self._metrics.troubles)
            if settings.audit_log:
                opened.callback(self._audit.end)
                self._audit.begin(Path(settings.audit_log), settings.audit_log_bytes, settings.audit_log_files)
            self.banks = Banks(self._engine, settings, self._metrics, limits, pauses)
            records, clock = self._engine.access, self._engine.store.clock
            rates = Rates(clock.now_us)
            verifier = Verifier(records, clock, rates, limits.key_believed_s, _tokens(settings, limits))
            self._rate_turns = RateTurns(rates, limits, settings.max_calls)
            self._admission = Admission(
                verifier,
                certificates.read(settings.tls_client),
                self._rate_turns,
                settings.insecure,
                limits,
                _trusts(self._tls),
            )
            opened.callback(self._admission.close)
            listen.check_callers(settings, self._admission.needed)
            opened.pop_all()
        self._metrics.show_open(lambda: bool(listen.left_open(settings, self._admission.needed)))
        if settings.insecure:
            nothing = ["it allows nothing here that is not allowed without it"]
            for sentence in listen.left_open(settings, self._admission.needed) or nothing:
                _log.warning("--insecure: %s", sentence)
        self._threads = StorageThreads(settings.storage_threads)
        self._service = MemoryService(
            self.banks, settings, self._threads, self._rate_turns, self._metrics, self.same_host, limits, pauses
        )
        tenants = Tenants(records, self._engine.forgetting, verifier, rates)
        self._services = (
            self._service,
            AccessService(self._service.handling, Keys(records, clock, verifier, limits), tenants),
            SessionService(self._service.handling, self._engine, self.banks, tenants, limits.stalled_s),
        )
        self._observer = Observer(self._metrics, self._audit)
        self._calls = Calls(settings.max_calls)
        self._direct: DirectCalls | None = None
        self._server: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._troubles = self._metrics.troubles
        self._health = _health(settings, self._troubles, self.banks, limits)
        self.address = ""

    async def start(self) -> None:
        """Bind the address, and serve; `address` is then what clients connect to. Where that fails, all is closed.
        Errors: StartError."""
        try:
            await self._begin()
        except BaseException:
            await self._end(None)
            raise

    async def _begin(self) -> None:
        awaited = Awaited(self._settings.max_calls, self._limits)
        self._server = grpc.aio.server(
            options=_options(self._settings, self._limits),
            interceptors=[Interceptor(self._observer, self._calls, self._admission, awaited)],
            maximum_concurrent_rpcs=self._settings.max_calls,
        )
        for described, service in zip(SERVICES, self._services, strict=True):
            # Not as registered methods: at each call, grpc.aio's server waits anew for the next call of each of those.
            methods = grpc.method_handlers_generic_handler(described.full_name, handlers(service, described))
            self._server.add_generic_rpc_handlers((methods,))
        self._health.add_to(self._server)
        if self._settings.reflection:
            from grpc_reflection.v1alpha import reflection

            names = (*(each.full_name for each in SERVICES), health.NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        # The endpoint listens before gRPC does, because a server of gRPC that is bound and was never started does not
        # give its port back.
        if self._settings.metrics_listen:
            admit = None if addresses.is_own(self._settings.metrics_listen) else self._admission.admit_to_figures
            self._endpoint = Endpoint(self._metrics.registry, self._troubles, self._limits, self._tls, admit)
            await self._endpoint.listen(self._settings.metrics_listen)
        self.address = self._bind()
        await self._server.start()
        self._tasks.append(asyncio.create_task(self._admission.look_after(self._calls)))
        if self._tls is not None:
            expiry = Expiry(self._tls, self._metrics, self._limits.certificate_s)
            self._tasks.append(asyncio.create_task(expiry.watch()))
        if self.same_host is not None:
            self._tasks.append(asyncio.create_task(_sweep(self.same_host)))
            if DirectCalls.possible(self.same_host.socket):
                self._direct = self._take_direct_calls(self.same_host.socket)
        await self._health.begin()

    def _take_direct_calls(self, socket: Path) -> DirectCalls:
        calls: dict[str, Call] = {"retrieve": self._service.retrieve_files, "fetch": self._service.fetch_files}
        return DirectCalls(socket, calls, self._observer, self._settings.max_message_bytes)

    def _bind(self) -> str:
        wanted = self._settings.listen
        address = addresses.for_grpc(wanted)
        try:
            # Whoever may write to a unix socket may call, and gRPC makes it as the umask says.
            with private.made_by_a_library():
                if self._tls is None or wanted.startswith("unix:"):
                    port = self._server.add_insecure_port(address)
                else:
                    port = self._server.add_secure_port(address, self._tls.for_grpc())
        except RuntimeError as error:
            raise StartError(f"cannot listen on {wanted}") from error
        return wanted if wanted.startswith("unix:") else f"{wanted.rpartition(':')[0]}:{port}"

    @property
    def metrics_address(self) -> str:
        """Return the HOST:PORT of /metrics; "" where that is off."""
        return self._endpoint.address if self._endpoint else ""

    async def stop(self) -> None:
        """Tell callers NOT_SERVING, begin no call, let calls that run finish within the grace time, then close the
        storage. Open streams finish the chunks that they began, and begin no other."""
        self._rate_turns.stop()
        self._troubles.begin("stopping", "what runs gets the grace time", stops=True, wanted=True)
        await self._health.tell()
        await self._end(self._settings.grace)

    async def _end(self, grace: float | None) -> None:
        for task in self._tasks:
            task.cancel()
        stopped = [self._calls.drain(grace)] if grace is not None else []
        if self._direct is not None:
            stopped.append(asyncio.to_thread(self._direct.close, grace or 0))
        await asyncio.gather(*stopped)
        if self._server is not None:
            await self._server.stop(_LAST_BYTES_S if grace is not None else None)
        if self._endpoint is not None:
            await self._endpoint.close()
        await self._health.end()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._threads.close(_LAST_STEP_S)
        self._admission.close()
        self.banks.close()
        if self.same_host is not None:
            self.same_host.close()
        self._engine.close()
        self._metrics.recorder.end()
        self._audit.end()


def _tls(settings: Settings, troubles: Troubles) -> Tls | None:
    """Return what TLS is spoken by, None where the service has no certificate. Errors: StartError."""
    if not settings.tls_cert:
        return None
    authorities = Path(settings.tls_client_ca) if settings.tls_client_ca else None
    return Tls(Files(Path(settings.tls_cert), Path(settings.tls_key), authorities), troubles)


def _trusts(tls: Tls | None) -> Callable[[bytes], bool] | None:
    """Return what tells whether a client's certificate counts on, None where clients need none."""
    return tls.trusts if tls is not None and tls.wants_certificates else None


def _tokens(settings: Settings, limits: Limits) -> Tokens | None:
    """Return what tokens of callers are checked by, None where none are taken. Errors: StartError."""
    if not settings.jwt_jwks:
        return None
    names = ("jwks", "audience", "issuer", "tenant_claim", "role_claim")
    return Tokens(Issuer(*(getattr(settings, f"jwt_{name}") for name in names)), limits)


def _health(settings: Settings, troubles: Troubles, banks: Banks, limits: Limits) -> Health:
    """Return what tells the health, to a quarter of all calls: everybody may ask for it."""
    return Health(troubles, [each.full_name for each in SERVICES], banks.probe, settings.max_calls // 4, limits)


def _options(settings: Settings, limits: Limits) -> list[tuple[str, int]]:
    """Return the options of gRPC's server."""
    # A client's certificate is looked at when it connects, and may expire, or be of no authority any more, after that.
    aged = [("grpc.max_connection_age_ms", _LONGEST_CERTIFIED_MS)] if settings.tls_client_ca else []
    return [
        *aged,
        # A peer that is gone is noticed after 80 s; clients may send pings every 10 s.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        # What a caller can hold without a call: a handshake that does not end, and a connection that is not used, whose
        # client makes another one when it needs it.
        ("grpc.server_handshake_timeout_ms", round(limits.handshake_s * 1000)),
        ("grpc.max_connection_idle_ms", round(limits.connection_idle_s * 1000)),
        # Of a call, the sum of its names and values; both are said, because between the two gRPC refuses at random.
        ("grpc.max_metadata_size", MOST_METADATA),
        ("grpc.absolute_max_metadata_size", MOST_METADATA),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Without SO_REUSEPORT a second server on the port is an error; with it, each would get some of the connections.
        ("grpc.so_reuseport", 0),
        # Calls of one connection; its client keeps further calls to itself until others have ended.
        ("grpc.max_concurrent_streams", MOST_STREAMS),
        # No compression: gRPC would make sixty thousand bytes of sixty before the service could refuse them.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_allowed_incoming_connections", for_connections(settings.max_connections)),
    ]


async def _sweep(same_host: SameHost) -> None:
    while True:
        await asyncio.sleep(FORGOTTEN_S / 4)
        await asyncio.to_thread(same_host.sweep)


async def serve(settings: Settings, ready: Any) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is called with the address once callers are served. This is for a process
    that is a server and nothing else. Errors: StartError."""
    keep_memory()
    take_short_turns()
    raise_limit()
    server = Server(settings)
    await server.start()
    try:
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        leave_imports_alone()
        ready(server.address)
        await stopping.wait()
    finally:
        await server.stop()
