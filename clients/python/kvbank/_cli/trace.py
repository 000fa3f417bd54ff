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
        print_json({"banks": [{"bank": name, **asdict(own)} for name, own in banks.items()], "lost": lost})
        return
    print_table(_COLUMNS, [_row(name, own) for name, own in banks.items()])
    if lost:
        print_line(f"{lost:,} events are not in the trace: the disk was slower than they came")


def _sums(file: Path) -> tuple[dict[str, _Bank], int]:
    """Return the sums by bank, and the events that are not in the trace. Errors: TraceError."""
    banks: dict[str, _Bank] = {}
    known: dict[str, set[int]] = {}
    lost = 0
    for event in traces.read(file):
        match event:
            case traces.Wrote(bank=name):
                own = banks.setdefault(name, _Bank())
                own.written, own.tokens, own.bytes = own.written + 1, own.tokens + event.tokens, own.bytes + event.size
            case traces.Retrieved(bank=name):
                own, found = banks.setdefault(name, _Bank()), known.setdefault(name, set())
                own.retrievals, own.found = own.retrievals + 1, own.found + sum(map(len, event.queries))
                found.update(*event.queries)
                own.found_chunks = len(found)
            case traces.Gone(bank=name):
                banks.setdefault(name, _Bank()).went(event.why, len(event.chunks))
            case traces.Dropped(bank=name):
                banks.setdefault(name, _Bank()).went("bank deleted", 1)
            case traces.Lost():
                lost += event.events
    return banks, lost


def _row(name: str, own: _Bank) -> tuple[Any, ...]:
    counts = (own.written, own.tokens)
    gone = ", ".join(f"{count:,} {why}" for why, count in own.gone.items())
    found = (own.retrievals, own.found, own.found_chunks)
    return (name, *(f"{n:,}" for n in counts), common.size(own.bytes), *(f"{n:,}" for n in found), gone or "none")
