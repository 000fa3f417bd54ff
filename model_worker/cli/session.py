"""`kvbank session` looks at the sessions on this machine, copies and deletes them.

The module is light to import: no torch.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import kvbank
from kvbank.console.ending import say
from kvbank.console.keys import ApiKey
from kvbank.console.output import print_json, print_line
from kvbank.console.table import Column
from model_worker.cli.shown import AsJson, Shown, Table, show
from model_worker.cli.targets import Memory, Sessions, folder_of, target_of
from model_worker.cli.terminal import printable, warnings_in_one_line
from model_worker.errors import SessionError
from model_worker.session.epoch import known_epochs
from model_worker.session.folder import read_session, read_sessions
from model_worker.session.left_banks import LeftBank, delete_noted, delete_own, note, noted
from model_worker.session.log import SessionLog, fork
from model_worker.session.log_format import Header, Turn, is_named, now
from model_worker.settings.base import LARGEST_COUNT

session = typer.Typer(no_args_is_help=True, help="Look at chat sessions and delete them.")

Name = Annotated[str, typer.Argument(help="Name of the session.")]

_SESSIONS = (
    Column("name", "name"),
    *map(Column, ("turns", "tokens")),
    Column("last said", "word"),
    *(Column(title, "name") for title in ("model", "memory")),
)


@dataclass(frozen=True, slots=True)
class _Left:
    """A bank that was not deleted.

    memory: the service that is to delete the bank later; empty: none. text: a line that says so.
    """

    memory: str
    text: str


@session.command("ls")
def list_sessions(sessions: Sessions = None, as_json: AsJson = False) -> None:
    """List the sessions on this machine.

    Example: kvbank session ls --json
    """
    folder = folder_of(sessions)
    with warnings_in_one_line():
        found = [_facts(*session) for session in read_sessions(folder)]
    if left := len(noted(folder)):
        say(f"banks of deleted sessions that are still there: {left}; kvbank session clean")
    figures = [(f"{facts['turns']:,}", f"{facts['tokens']:,}") for facts in found]
    rows = [
        (facts["name"], *pair, facts["last"], Path(facts["model"]).name, facts["memory"])
        for facts, pair in zip(found, figures, strict=True)
    ]
    show(Shown(found, [Table(_SESSIONS, rows)]), as_json=as_json)


@session.command("show")
def show_session(
    name: Name,
    last: Annotated[int, typer.Option(min=0, max=LARGEST_COUNT, help="How many turns to show.")] = 5,
    sessions: Sessions = None,
    as_json: AsJson = False,
) -> None:
    """Show where a session stands, and what was said last.

    Example: kvbank session show diary --last 20
    """
    header, turns = read_session(folder_of(sessions), name)
    said = [turn for turn in turns if not turn.part]
    said = said[len(said) - min(last, len(said)) :]
    facts = _facts(header, turns)
    if as_json:
        print_json({**facts, "said": [{"time": t.time, "text": t.text, "answer": t.answer} for t in said]})
        return
    for key, value in facts.items():
        print_line(f"{key:8} {value:,}" if isinstance(value, int) else f"{key:8} {value}")
    for turn in said:
        print(printable(f"\n{turn.time}\n> {turn.text}\n{turn.answer}"))


@session.command("fork")
def fork_session(
    name: Name,
    new: Annotated[str, typer.Argument(help="Name of the new session.")],
    sessions: Sessions = None,
    as_json: AsJson = False,
) -> None:
    """Begin a session with what was said in another; its bank is written from the log at its first start.

    Example: kvbank session fork diary draft
    """
    made = fork(folder_of(sessions), name, new)
    line = f"session {new} goes on from {name}; its bank is {made.bank}"
    show(Shown(asdict(made), [line]), as_json=as_json)


@session.command("rm")
def remove_session(
    name: Name,
    memory: Memory = None,
    api_key: ApiKey = None,
    sessions: Sessions = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Delete the log even where its bank is not found, or the service is away.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a session, first its bank, then its log. A bank that --force leaves is noted for `session clean`.

    Example: kvbank session rm diary
    """
    folder = folder_of(sessions)
    with SessionLog.open(folder, name, must_exist=True) as log:
        turns = sum(not turn.part for turn in log.turns)
        bank = log.header.bank if log.header else None
        if not yes:
            typer.confirm(f"Delete session {name!r}, its {turns} turns and bank {bank}?", abort=True, err=True)
        epochs = known_epochs(log.epoch)
        target = target_of(memory, log.header)
        left = None if log.header is None else _remove_bank(log.header, epochs, target, api_key, force)
        if log.header is not None and left is not None and left.memory:
            note(folder, LeftBank(str(bank), left.memory, name, now(), epochs, is_named(log.header)))
        log.remove()
    document = {"deleted": name, "turns": turns, "bank": bank, "bank_deleted": left is None and bank is not None}
    line = f"deleted session {name}, {turns} turns" + (f", bank {bank}" if left is None else "")
    show(Shown(document, [line]), as_json=as_json)
    if left is not None:
        say(left.text)


@session.command("clean")
def clean_sessions(sessions: Sessions = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Delete the banks that deleted sessions have left, where their services are there again.

    The command ends with 1 where a bank is still there.

    Example: kvbank session clean
    """
    found = list(delete_noted(folder_of(sessions), api_key))
    for left, trouble in found:
        if trouble:
            say(f"bank {left.bank} of session {left.session} is still there: {trouble}")
        elif not as_json:
            print_line(f"deleted bank {left.bank} of session {left.session}")
    if as_json:
        print_json([{"session": left.session, "bank": left.bank, "deleted": not trouble} for left, trouble in found])
    if any(trouble for _, trouble in found):
        raise typer.Exit(1)


def _remove_bank(header: Header, epochs: list[str], target: str, api_key: str | None, force: bool) -> _Left | None:
    """Delete the bank of a session. Return what is left of it where `force` passes over one that cannot be deleted.

    A bank cannot be deleted where its service is away, where it is not found, and where another copy of the session
    owns it. Raises SessionError for such a bank without `force`.
    """
    bank = header.bank
    try:
        with kvbank.connect(target, timeout=3, first_contact=1, api_key=api_key) as client:
            delete_own(client, bank, epochs, named=is_named(header))
    except SessionError as error:
        if not force:
            raise SessionError(f"nothing was deleted: {error}; delete the log alone with --force") from None
        return _Left("", f"{error}: it stays")
    except kvbank.KVBankError as error:
        if not force:  # the bank may be elsewhere, and only the log names it
            raise SessionError(
                f"nothing was deleted, since bank {bank} was not found at {target}: {error}; name its service with "
                "--memory, or delete the log alone with --force"
            ) from None
        if isinstance(error, kvbank.BankNotFound):
            return _Left(header.memory, f"bank {bank} is not at {target}; if it is elsewhere, it is still there")
        return _Left(target, f"bank {bank} was not deleted: {error}; `kvbank session clean` deletes it later")
    return None


def _facts(header: Header, turns: list[Turn]) -> dict[str, Any]:
    """Return what the commands print of a session: its header, the number of turns and tokens, when the last was."""
    facts = asdict(header)
    tokens = sum(len(turn.ids) for turn in turns)
    said = [turn for turn in turns if not turn.part]
    return {**facts, "turns": len(said), "tokens": tokens, "last": turns[-1].time if turns else header.created}
