"""The commands of `kvbank session` look at the sessions of a service, fork and rewind them, forget, and move them."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kvbank
from kvbank._cli import common, parse
from kvbank._cli.bank_options import LARGEST
from kvbank._cli.common import AsJson, Service
from kvbank._cli.receipts import tell_receipt
from kvbank.console.options import spread
from kvbank.console.output import print_json, print_line, printable
from kvbank.console.progress import progress
from kvbank.console.table import Column, print_table

if TYPE_CHECKING:
    from kvbank import Client, Session, Turn

_SESSIONS = (
    Column("name", "name"),
    Column("id", "word"),
    *map(Column, ("turns", "tokens")),
    Column("bank", "name"),
    Column("held by", "name"),
    Column("age", "word"),
)
_ID_LENGTH = 32
_INDENT = "    "

Which = Annotated[str, typer.Argument(metavar="SESSION", help="Name or id of the session.")]
NewName = Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the new session; none by default.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

app = typer.Typer(no_args_is_help=True, help="Look at sessions, fork, rewind, export, import and forget them.")


@app.command("ls")
@spread
def list_sessions(
    service: Service,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="Only those that have this; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the sessions of a memory service, the last changed first.

    Example: kvbank session ls --memory ./memory
    """
    with service.connect() as client:
        found = list(client.sessions.list(parse.texts(metadata or ())))
    if as_json:
        print_json([asdict(session) for session in found])
        return
    now = datetime.now(UTC)
    rows = (
        (
            session.name,
            session.session_id,
            f"{session.head:,}",
            f"{session.tokens:,}",
            session.bank,
            session.lease.holder if session.lease else "",
            common.age(now - session.update_time),
        )
        for session in found
    )
    print_table(_SESSIONS, rows)


@app.command("show")
@spread
def show_session(
    which: Which,
    service: Service,
    last: Annotated[int, typer.Option(min=0, max=LARGEST, help="How many turns to show.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show where a session stands, and what was said last.

    Example: kvbank session show diary --last 20
    """
    with service.connect() as client:
        session = _found(client, which)
        after = max(session.head - last, 0)
        turns = list(client.sessions.turns(session.session_id, after)) if last else []
    if as_json:
        print_json({**asdict(session), "last_turns": [asdict(turn) for turn in turns]})
        return
    _print_session(session)
    for turn in turns:
        _print_turn(turn)


@app.command("reads")
@spread
def change_reads(
    which: Which,
    service: Service,
    banks: Annotated[
        list[str] | None, typer.Argument(metavar="[BANK]...", help="What it reads from now on.", show_default=False)
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="Let it read no bank besides its own.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which banks a session reads besides its own, or let it read others in their place.

    They have K-V of the session's model (kvbank remember --model). A worker goes by it when it opens the session next.

    Example: kvbank session reads diary library
    """
    if none and banks:
        raise typer.BadParameter("give banks or --none, and not both")
    with service.connect() as client:
        session = _found(client, which)
        for bank in banks or ():
            client.get_bank(bank)
        if none or banks:
            session = client.sessions.update(session.session_id, reads=banks or ())
    line = f"session {which} reads {', '.join(session.reads) or 'no bank besides its own'}"
    _answer({"session_id": session.session_id, "reads": session.reads}, line, as_json)


@app.command("fork")
@spread
def fork_session(
    which: Which,
    service: Service,
    name: NewName = "",
    turn: Annotated[
        int | None, typer.Option(min=0, max=LARGEST, help="The last turn that it has; the last one by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Begin a session with the turns of another, up to one of them. Nothing is copied.

    Example: kvbank session fork diary draft --turn 12
    """
    with service.connect() as client:
        made = client.sessions.fork(_found(client, which).session_id, name=name, turn=turn)
    line = f"session {made.name or made.session_id} goes on from {which} behind turn {made.head}"
    _answer(asdict(made), line, as_json)


@app.command("rewind")
@spread
def rewind_session(
    which: Which,
    turn: Annotated[
        int, typer.Argument(min=0, max=LARGEST, help="The turn that is the last one then; 0: none is left.")
    ],
    service: Service,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Let a session go on behind an earlier turn; the turns behind that are kept until they are forgotten.

    Example: kvbank session rewind diary 12
    """
    with service.connect() as client:
        session = _found(client, which)
        _ask(yes, f"Let session {printable(which)!r} go on behind turn {turn} of {session.head}?")
        with _leased(client, session, "rewind") as epoch:
            now = client.sessions.rewind(session.session_id, turn, epoch=epoch)
    line = f"session {which} goes on behind turn {now.head}, {_turns(session.head - now.head)} before its end"
    _answer(asdict(replace(now, lease=None)), line, as_json)


@app.command("forget")
@spread
def forget_turns(
    which: Which,
    turns: Annotated[str, typer.Argument(metavar="TURNS", help="A turn, such as 7, or several, such as 7-9.")],
    service: Service,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Forget turns of a session and of all its forks, for good, and show the receipt.

    Example: kvbank session forget diary 7-9
    """
    first, last = parse.turns(turns)
    with service.connect() as client:
        session = _found(client, which)
        _ask(yes, f"Forget turns {first} to {last} of session {printable(which)!r} for good?")
        receipt = client.sessions.forget(session.session_id, first=first, last=last)
    tell_receipt(receipt, as_json)


@app.command("export")
@spread
def export_session(
    which: Which,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, such as diary.kvsession.")],
    service: Service,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a session with all its turns into one file, which only you can read.

    Chunks are not in it: a worker makes them again from the turns.

    Example: kvbank session export diary diary.kvsession
    """
    with service.connect() as client, progress() as bar:
        session = client.sessions.export(
            _found(client, which).session_id, path, overwrite=force, progress=lambda *done: bar("turns", *done)
        )
    line = f"exported {_turns(session.head)}, {session.tokens:,} tokens to {path}"
    _answer({"file": path, "session_id": session.session_id, "turns": session.head}, line, as_json)


@app.command("import")
@spread
def import_session(
    path: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A file of `export`, or the folder of a session of an earlier version."),
    ],
    service: Service,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the session; the one in the file by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a session of a file, here or in another service; when it ends early, it goes on when it is called again.

    The session gets a new id and a new bank, which a worker makes from the
    turns. Folders of earlier versions lie in ~/.local/state/kvbank/sessions.

    Example: kvbank session import diary.kvsession --name diary-2
    """
    with service.connect() as client, progress() as bar:
        session = client.sessions.import_(path, name=name, progress=lambda *done: bar("turns", *done))
    line = f"imported {_turns(session.head)}, {session.tokens:,} tokens as session {session.name or session.session_id}"
    _answer(asdict(session), line, as_json)


@app.command("rm")
@spread
def remove_session(which: Which, service: Service, yes: Yes = False, as_json: AsJson = False) -> None:
    """Forget a whole session for good, but for what its forks have of it, and show the receipt.

    Example: kvbank session rm diary
    """
    with service.connect() as client:
        session = _found(client, which)
        held = f"; {session.lease.holder} has it now" if session.lease else ""
        _ask(yes, f"Delete session {printable(which)!r} and its {_turns(session.head)} for good{printable(held)}?")
        receipt = client.sessions.forget(session.session_id)
    tell_receipt(receipt, as_json)


def _found(client: "Client", which: str) -> "Session":
    """Return a session by its name, or else by its id."""
    try:
        return client.sessions.get(name=which)
    except kvbank.SessionNotFound:
        if len(which) != _ID_LENGTH:
            raise
    return client.sessions.get(which)


@contextmanager
def _leased(client: "Client", session: "Session", what: str) -> Iterator[int]:
    """Hold the lease of a session while the block runs, and give its epoch."""
    holder = f"kvbank session {what} on {socket.gethostname()}, process {os.getpid()}"
    lease = client.sessions.acquire(session.session_id, holder).lease
    assert lease is not None
    try:
        yield lease.epoch
    finally:
        client.sessions.release(session.session_id, lease.epoch)


def _ask(yes: bool, question: str) -> None:
    if not yes:
        typer.confirm(question, abort=True, err=True)


def _answer(document: dict[str, Any], line: str, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        print_line(line)


def _turns(count: int) -> str:
    return f"{count:,} turn{'' if count == 1 else 's'}"


def _print_session(session: "Session") -> None:
    _line("name", session.name)
    _line("id", session.session_id)
    _line("turns", f"{session.head:,}, {session.tokens:,} tokens")
    _line("bank", session.bank)
    for bank in session.reads:
        _line("reads", bank)
    if session.forked_from:
        _line("fork of", f"{session.forked_from.session_id}, turn {session.forked_from.turn}")
    _line("created", common.moment(session.create_time))
    _line("changed", common.moment(session.update_time))
    _line("expires", common.moment(session.expire_time))
    if session.lease:
        _line("held by", f"{session.lease.holder}, until {common.moment(session.lease.expire_time)}")
    _line("reader", session.reader_digest)
    for label, pairs in (("settings", session.settings), ("metadata", session.metadata)):
        for key, value in sorted(pairs.items()):
            _line(label, f"{key} = {value}")


def _print_turn(turn: "Turn") -> None:
    status = "" if turn.status == "completed" else f", {turn.status}"
    print_line("")
    print_line(f"turn {turn.number}, {common.moment(turn.create_time)}, {turn.token_count:,} tokens{status}")
    for item in turn.items:
        print(printable(f"{item.role}: {item.text or item.json}", keep="\n\t").replace("\n", f"\n{_INDENT}"))


def _line(label: str, text: str) -> None:
    print_line(f"{label:10} {text}".rstrip())
