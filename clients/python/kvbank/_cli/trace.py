"""The command `kvbank bank trace` sums up what a service has recorded."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbank._cli import common
from kvbank._cli.common import AsJson
from kvbank.console.ending import Failed
from kvbank.console.output import print_json, print_line
from kvbank.console.table import Column, print_table
from kvbank.files import traces

_COLUMNS = (
    Column("bank", "name"),
    *map(Column, ("written", "tokens", "bytes", "retrievals", "found", "chunks found", "gone")),
)


@dataclass(slots=True)
class _Bank:
    """The sums of one bank. found: chunks by all queries; found_chunks: how many different ones. gone: by why."""

    bank: str
    written: int = 0
    tokens: int = 0
    bytes: int = 0
    retrievals: int = 0
    found: int = 0
    found_chunks: int = 0
    gone: dict[str, int] = field(default_factory=dict)

    def went(self, why: str, count: int) -> None:
        """Count what has gone."""
        self.gone[why] = self.gone.get(why, 0) + count


def trace(
    file: Annotated[Path, typer.Argument(help="What kvbank serve --record has written; may be packed as .gz.")],
    as_json: AsJson = False,
) -> None:
    """Sum up a recorded trace: what was written, retrieved and gone, bank by bank.

    Example: kvbank bank trace memory.trace.jsonl
    """
    try:
        banks, lost = _sums(file)
    except traces.TraceError as error:
        raise Failed(str(error)) from None
    if as_json:
        print_json({"banks": [asdict(own) for own in banks], "lost": lost})
        return
    print_table(_COLUMNS, list(map(_row, banks)))
    if lost:
        print_line(f"{lost:,} events are not in the trace: the disk was slower than they came")


def _sums(file: Path) -> tuple[list[_Bank], int]:
    """Return the sums of each bank, and the events that are not in the trace. Banks of one name in several stores are
    several banks. Errors: TraceError."""
    banks: dict[tuple[str, str], _Bank] = {}
    known: dict[tuple[str, str], set[int]] = {}
    store, lost = "", 0

    def of(name: str) -> _Bank:
        return banks.setdefault((store, name), _Bank(name))

    for event in traces.read(file):
        match event:
            case traces.Begun():
                store = event.store
            case traces.Wrote(bank=name):
                own = of(name)
                own.written, own.tokens, own.bytes = own.written + 1, own.tokens + event.tokens, own.bytes + event.size
            case traces.Retrieved(bank=name):
                own, found = of(name), known.setdefault((store, name), set())
                own.retrievals, own.found = own.retrievals + 1, own.found + sum(map(len, event.queries))
                found.update(*event.queries)
                own.found_chunks = len(found)
            case traces.Gone(bank=name):
                of(name).went(event.why, len(event.chunks))
            case traces.Dropped(bank=name):
                of(name).went("bank deleted", 1)
            case traces.Lost():
                lost += event.events
    return list(banks.values()), lost


def _row(own: _Bank) -> tuple[Any, ...]:
    counts = (own.written, own.tokens)
    gone = ", ".join(f"{count:,} {why}" for why, count in own.gone.items())
    found = (own.retrievals, own.found, own.found_chunks)
    return (own.bank, *(f"{n:,}" for n in counts), common.size(own.bytes), *(f"{n:,}" for n in found), gone or "none")
