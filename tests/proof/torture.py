"""The proofs that take minutes: python -m tests.proof.torture [--kills N] [--seed N] ...; `make torture ARGS=...`.

Every part prints what it did and found; the exit status is 1 when one of them found something. A part with 0 is left
out.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple
from functools import partial
from pathlib import Path

import grpc

import kvbank
from kvbank.v1 import service_pb2 as pb
from kvbank.wire.stub import make_stub
from tests.faults import shim
from tests.proof import power_cuts
from tests.proof.chat_kills import kill_chats
from tests.proof.cost import Cost, cost_of
from tests.proof.crowd import crowd
from tests.proof.damage import damage
from tests.proof.flips import PLACES, Flipped, flip_often, prepare
from tests.proof.floods import SIZES, all_floods, send, send_directly
from tests.proof.fuzz import fuzz
from tests.proof.handshakes import free_address, greet, unescaped
from tests.proof.kills import Killed, kill_often
from tests.proof.pass_through import GIB, pass_through
from tests.proof.replicas import Survived, torment
from tests.proof.workers import paced, paced_together
from tests.support.certificates import Authority
from tests.support.engines import ENGINES
from tests.support.service_process import Service, ServiceHost

# The answers of a paced service spread by no more than this.
SPREAD = 3.0
# The calls of two services differ by no more than this.
SHARE = 0.1
_FLIPS_A_START = 10


def _kills(arguments: argparse.Namespace, place: Path) -> bool:
    def tell(killed: Killed) -> None:
        if killed.kills % 10 == 0:
            _say(f"  {killed}")

    with ServiceHost() as host:
        killed = kill_often(host, place, arguments.kills, arguments.seed, tell=tell)
    _say(f"SIGKILL under load: {killed}")
    for text in (f"lost: {killed.lost[:20]}", *killed.wrong[:20]) if killed.lost or killed.wrong else ():
        _say(f"  {text}")
    return not killed.lost and not killed.wrong


def _damage(arguments: argparse.Namespace, place: Path) -> bool:
    with ServiceHost() as host:
        holds = True
        for path, same_host in (("stream", False), ("files", True)):
            service = host.start(place / path, durability="os", same_host=same_host)
            with kvbank.connect(service.address) as client:
                report = damage(client, place / path, arguments.flips, arguments.seed)
            service.stop()
            _say(f"{arguments.flips} flipped bytes, two swapped files, one cut, one longer; by {path}: {report}")
            holds &= report.holds
    return holds


def _flips(arguments: argparse.Namespace, place: Path) -> bool:
    """Flip a bit anywhere in the folder; each flip takes a start, so there are fewer of them."""
    flips = max(arguments.flips // _FLIPS_A_START, 1)
    with ServiceHost() as host:
        folders = prepare(host, place)

        def tell(flipped: Flipped) -> None:
            if sum(flipped.seen[name] for name in PLACES) % 100 == 0:
                _say(f"  {flipped}")

        flipped = flip_often(host, folders, flips, arguments.seed, tell)
    _say(f"{flips} flipped bits in payloads, snapshots, pages and logs: {flipped}")
    for text in flipped.bad[:20]:
        _say(f"  {text}")
    return not flipped.bad


def _payloads_and_flips(arguments: argparse.Namespace, place: Path) -> bool:
    (place / "payloads").mkdir()
    (place / "folders").mkdir()
    return _damage(arguments, place / "payloads") & _flips(arguments, place / "folders")


def _power_cuts(arguments: argparse.Namespace, place: Path) -> bool:
    library = shim.build(place)
    if library is None:
        _say("power cuts: SKIPPED, there is no C compiler")
        return True
    recording = power_cuts.record(library, place / "recording", operations=100)
    found = [broken for broken in power_cuts.broken(recording, arguments.cuts, arguments.seed) if broken]
    _say(f"power cuts: {arguments.cuts} in a life of {len(recording.records)} changes, {len(found)} with a loss")
    for broken in found[:20]:
        _say(f"  {broken}")
    return not found


def _fuzz(arguments: argparse.Namespace, place: Path) -> bool:
    with ServiceHost() as host:
        service = host.start(place / "data", durability="os", same_host=True)
        before = service.resident_bytes()
        messages, report = 0, None
        for turn in range(1_000_000):
            report = fuzz(service.address, 10_000, arguments.seed * 10**9 + turn * 10_000)
            messages += report.messages
            _say(f"  {report}")
            if messages >= arguments.messages or report.bad:
                break
        grown = (service.resident_bytes() - before) >> 20
        costly = _floods(service)
        ended = service.stop()
    assert report is not None
    _say(f"malformed messages: {messages}, against the rules {len(report.bad)}; memory grew by {grown} MiB")
    for text in (*report.bad[:20], *costly):
        _say(f"  {text}")
    return not report.bad and not costly and ended == 0


def _handshakes(arguments: argparse.Namespace, place: Path) -> bool:
    authority, holds = Authority(place / "authority"), True
    with ServiceHost() as host:
        for name, settings in (("plain", {}), ("tls", authority.settings())):
            flags = {"listen": "127.0.0.1:0", "metrics_listen": free_address(), "durability": "os"} | settings
            service = host.start(place / name, **flags)
            addresses, share = (service.address, flags["metrics_listen"]), arguments.handshakes // 4
            for address in addresses:
                greet(address, min(share, 1000), arguments.seed * 10**9)
            before = service.resident_bytes()
            for address in addresses:
                greet(address, share, arguments.seed * 10**9)
            grown, bad = (service.resident_bytes() - before) >> 20, unescaped(service.log())
            well = service.stop() == 0 and not bad and grown < 50
            _say(f"handshakes, {name}: {2 * share}; memory grew by {grown} MiB, {len(bad)} lines not escaped")
            holds &= well
    return holds


def _floods(service: Service) -> list[str]:
    """Flood every field of every method and of direct calls, in millions; report those that cost more than a message
    may."""
    worst, costly, sent = Cost(0, 0, 0.0), list[str](), 0
    with grpc.insecure_channel(service.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        shared = make_stub(channel).GetServerInfo(pb.GetServerInfoRequest()).same_host
        calls = {"direct": partial(send_directly, str(Path(shared.root, shared.socket)))}
        for kind, size in SIZES.items():
            for method, path, data in all_floods(size):
                call = calls.get(method) or partial(send, channel, method, timeout=100)
                cost = cost_of(service, partial(_refused, call, data))
                worst, sent = Cost(*map(max, zip(astuple(worst), astuple(cost), strict=True))), sent + 1
                if not cost.within(len(data)):
                    costly.append(f"{method} {path} ({kind}): {cost}")
            _say(f"  floods of {size >> 10} KiB: at most {worst.peak >> 20} MiB, others waited {worst.waited:.3f} s")
    _say(f"floods: {sent} messages, {len(costly)} too costly; {service.resident_bytes() >> 20} MiB afterwards")
    return costly


def _refused(call: Callable[..., object], data: bytes) -> None:
    with suppress(grpc.RpcError):
        call(data=data)


def _workers(arguments: argparse.Namespace, place: Path) -> bool:
    with ServiceHost() as host:
        report = paced(host, place, arguments.minutes * 60)
    _say(f"8 workers, {arguments.minutes:g} minutes: {report}")
    even = all(p99 <= SPREAD * p50 for p50, p99 in report.quantiles.values())
    if not even:
        _say(f"  p99 is above {SPREAD:g} times p50")
    return even and report.exact and not report.errors


def _workers_together(arguments: argparse.Namespace, place: Path) -> bool:
    if why := ENGINES["postgres"].missing():
        _say(f"8 workers on two services: SKIPPED, {why}")
        return True
    with ServiceHost() as host:
        report = paced_together(host, place, arguments.minutes_together * 60)
    _say(f"8 workers on two services, {arguments.minutes_together:g} minutes, load {os.getloadavg()[0]:.1f}: {report}")
    even = all(p99 <= SPREAD * p50 for p50, p99 in report.quantiles.values())
    if not even:
        _say(f"  p99 is above {SPREAD:g} times p50")
    if report.spread > SHARE:
        _say(f"  a service had {report.spread:.0%} more calls than the other")
    return even and report.spread <= SHARE and report.exact and not report.errors


def _pass_through(arguments: argparse.Namespace, place: Path) -> bool:
    with ServiceHost() as host:
        report = pass_through(host, place, int(arguments.gigabytes * GIB))
    _say(f"pass-through: {report}")
    return report.holds


def _replicas(arguments: argparse.Namespace, place: Path) -> bool:
    if why := ENGINES["postgres"].missing():
        _say(f"several services on one database: SKIPPED, {why}")
        return True

    def tell(survived: Survived) -> None:
        if survived.rounds % 10 == 0:
            _say(f"  {survived}; load {os.getloadavg()[0]:.1f}")

    with ServiceHost() as host:
        survived = torment(host, place, arguments.replicas, arguments.seed, tell=tell)
    _say(f"several services on one database: {survived}")
    for text in (*survived.lines(), *survived.wrong[:20], *map(str, survived.lost[:20])):
        _say(f"  {text}")
    return survived.holds


def _chats(arguments: argparse.Namespace, place: Path) -> bool:
    with ServiceHost() as host:
        report = crowd(host, place, arguments.sessions * 60)
    _say(f"two workers by turns, {arguments.sessions:g} minutes: {report}")
    for text in report.wrong[:20]:
        _say(f"  {text}")
    return report.holds


def _chat_kills(arguments: argparse.Namespace, place: Path) -> bool:
    with ServiceHost() as host:
        killed = kill_chats(
            host, place, arguments.session_kills, arguments.seed, tell=lambda killed: _say(f"  {killed}")
        )
    _say(f"SIGKILL in conversations: {killed}")
    for text in killed.wrong[:20]:
        _say(f"  {text}")
    return killed.holds


# Option, default, help, part.
PARTS: tuple[tuple[str, float, str, Callable[[argparse.Namespace, Path], bool]], ...] = (
    ("kills", 200, "SIGKILLs under load", _kills),
    ("flips", 10_000, "payloads to damage, and a tenth as many bits of a folder", _payloads_and_flips),
    ("cuts", 400, "power cuts", _power_cuts),
    ("messages", 100_000, "malformed messages, and messages of millions of parts", _fuzz),
    ("handshakes", 100_000, "connections of callers who speak no protocol, or a broken one", _handshakes),
    ("sessions", 5.0, "minutes of 20 conversations over two workers of HTTP", _chats),
    ("session_kills", 100, "SIGKILLs of workers and of the service while a message is answered", _chat_kills),
    ("replicas", 100, "faults around two services on one database", _replicas),
    ("minutes", 0.0, "minutes of eight paced workers", _workers),
    ("minutes_together", 0.0, "minutes of eight paced workers on two services", _workers_together),
    ("gigabytes", 0.0, "GiB to pass through", _pass_through),
)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=[name for name, *_ in PARTS], help="leave out all other parts")
    for name, default, text, _ in PARTS:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)")
    arguments, holds = parser.parse_args(words), True
    logging.disable(logging.WARNING)  # of the services that power cuts open in this process
    for name, _, _, part in PARTS:
        if getattr(arguments, name) and arguments.only in (None, name):
            with _place() as place:
                holds &= part(arguments, place)
    _say("nothing lost, nothing wrong" if holds else "FAILED")
    return 0 if holds else 1


@contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvbank-torture-") as place:
        yield Path(place)


_START = time.monotonic()


def _say(text: str) -> None:
    print(f"{time.monotonic() - _START:7.1f} s  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
