"""The command `kvbank top` shows live what a memory service does a second."""

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from kvbank._cli import common, parse
from kvbank._cli.common import AsJson, Service
from kvbank._cli.rates import BankRate, MethodRate, Rates, between
from kvbank.console.options import spread
from kvbank.console.output import print_json
from kvbank.console.table import Column, console, print_table, table, terminal_width

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvbank import Client

Interval = Annotated[
    float,
    typer.Option("--interval", "-i", parser=parse.interval, metavar="TIME", help="Time between samples: 2s, 500ms, 5."),
]
Once = Annotated[bool, typer.Option("--once", help="Print one sample and end, as without a terminal.")]


@spread
def top(service: Service, interval: Interval = 2.0, once: Once = False, as_json: AsJson = False) -> None:
    """Watch a memory service: requests, latencies, bytes and banks, by the second. Ends with q or Ctrl-C.

    Example: kvbank top --memory localhost:7400 --interval 5
    """
    with service.connect() as client:
        if as_json or once or not sys.stdout.isatty():
            rates = next(_samples(client, interval, time.sleep))
            if as_json:
                print_json(asdict(rates))
            else:
                _print(rates)
            return
        _live(client, interval)


def _live(client: "Client", interval: float) -> None:
    from rich.live import Live

    with _keyboard() as wait, Live(console=console(), screen=True, auto_refresh=False) as live:
        try:
            for rates in _samples(client, interval, wait):
                live.update(_picture(rates), refresh=True)
        except KeyboardInterrupt:
            return


def _samples(client: "Client", interval: float, wait: Callable[[float], object]) -> Iterator[Rates]:
    """Yield the rates between each two answers, `interval` seconds apart, until `wait` returns True."""
    before, since = client.stats(), time.monotonic()
    while not wait(interval):
        after, now = client.stats(), time.monotonic()
        yield between(before, after, now - since)
        before, since = after, now


@contextmanager
def _keyboard() -> Iterator[Callable[[float], object]]:
    """Give a function that waits so many seconds and tells whether q was pressed meanwhile, without Enter."""
    if not sys.stdin.isatty():
        yield time.sleep
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    settings = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield partial(_pressed, terminal)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, settings)


def _pressed(terminal: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            keys = os.read(terminal, 64)
            if not keys or b"q" in keys.lower():
                return True
    return False


def _print(rates: Rates) -> None:
    print(_head(rates), end="\n\n")
    print_table(_METHODS, map(_method, rates.methods))
    print()
    print_table(_BANKS, map(_bank, rates.banks))


def _picture(rates: Rates) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    width = terminal_width()
    methods = table(_METHODS, map(_method, rates.methods), width)
    banks = table(_BANKS, map(_bank, rates.banks), width)
    return Group(Text(_head(rates)), Text(), methods, Text(), banks)


def _head(rates: Rates) -> str:
    if not rates.methods:
        return f"the figures of the whole service are for operators; over {rates.seconds:.1f} s"
    return (
        f"payloads {common.size(rates.received_bytes_per_second)}/s in, "
        f"{common.size(rates.sent_bytes_per_second)}/s out, {common.size(rates.in_flight_bytes)} in flight; "
        f"memory {common.size(rates.resident_bytes)}, "
        f"disk {common.size(rates.free_bytes)} free; over {rates.seconds:.1f} s"
    )


_METHODS = (Column("method", "name"), *map(Column, ("/s", "errors/s", "p50 ms", "p99 ms")))
_BANKS = (
    Column("bank", "name"),
    *map(Column, ("chunks", "bytes", "written/s", "evicted/s", "expired/s")),
    Column("index", "word"),
)


def _method(rate: MethodRate) -> tuple[str, ...]:
    milliseconds = ("-" if each is None else f"{each:.2f}" for each in (rate.p50_ms, rate.p99_ms))
    return (rate.method, f"{rate.per_second:,.1f}", f"{rate.errors_per_second:,.1f}", *milliseconds)


def _bank(rate: BankRate) -> tuple[str, ...]:
    figures = (rate.written_per_second, rate.evicted_per_second, rate.expired_per_second)
    return (rate.name, f"{rate.chunks:,}", common.size(rate.bytes), *(f"{each:,.1f}" for each in figures), rate.index)
