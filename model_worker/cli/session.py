"""`kvbank chat` and `kvbank session`. Cheap to import: what is heavy comes inside the commands."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import kvbank
from kvbank.console.ending import say
from kvbank.console.output import print_json, print_line
from kvbank.console.table import Column, print_table
from model_worker.attachment.model_names import SHIPPED, model_folder
from model_worker.cli.option_bounds import LARGEST_COUNT, LARGEST_SEED
from model_worker.cli.terminal import printable, warnings_in_one_line
from model_worker.errors import SessionError
from model_worker.session.epoch import known_epochs
from model_worker.session.left_banks import LeftBank, delete_noted, delete_own, note, noted
from model_worker.session.log import (
    Header,
    SessionLog,
    Turn,
    find_session,
    fork,
    now,
    read_session,
    read_sessions,
    sessions_folder,
)

Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        "-m",
        envvar="KVBANK_MEMORY",
        help="Memory service: HOST:PORT, unix:PATH or a folder. By default the one that the session was begun with, "
        "for a new session a folder of yours.",
    ),
]
Sessions = Annotated[Path | None, typer.Option("--sessions", help="Folder of the sessions' logs.")]
Name = Annotated[str, typer.Argument(help="Name of the session.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_START_S = 3.0  # for a first answer, so that a service that is not there is noticed before a model is loaded

_SESSIONS = (
    Column("name", "name"),
    *map(Column, ("turns", "tokens")),
    Column("last said", "word"),
    *(Column(title, "name") for title in ("model", "memory")),
)


@dataclass(frozen=True, slots=True)
class _Left:
    """A bank that was not deleted: where it is to be deleted later (empty: nowhere), and how that is said."""

    memory: str
    text: str


def register_session_commands(app: typer.Typer) -> None:
    """Add `chat` and `session ls|show|fork|rm|clean` to the `kvbank` command line."""
    session = typer.Typer(no_args_is_help=True, help="Look at chat sessions and delete them.")
    app.command("chat")(chat)
    session.command("ls")(list_sessions)
    session.command("show")(show_session)
    session.command("fork")(fork_session)
    session.command("rm")(remove_session)
    session.command("clean")(clean_sessions)
    app.add_typer(session, name="session")


def chat(
    session: Annotated[str, typer.Option("--session", "-s", help="Name of the session; a new one begins.")] = "default",
    memory: Memory = None,
    model: Annotated[
        str | None,
        typer.Option(help="kvbank-small (shipped), a model folder, or a hub id; by default the session's own."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_COUNT, help="Local tokens; the rest is in the bank.")
    ] = None,
    local: Annotated[
        str | None, typer.Option(help="What each layer keeps of the local tokens: tova:m=N; by default the window.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, max=LARGEST_COUNT, help="Chunks a recall.")] = None,
    compressor: Annotated[str, typer.Option(help="How chunks are compressed, e.g. tova:m=48.")] = "none",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=-LARGEST_SEED, max=LARGEST_SEED, help="Of sampling.")] = 0,
    style: Annotated[
        str, typer.Option("--format", help="Prompt: auto, template (the model's), plain (User: ...) or continue.")
    ] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="End when the memory service is away.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Print answers only.")] = False,
    sessions: Sessions = None,
) -> None:
    """Talk to a model that remembers, also after it was started again.

    Example: kvbank chat --session diary --memory localhost:7400
    """
    folder = _place(sessions, may_be_missing=True)
    known = _known(folder, session)
    name = model or (known.model if known else SHIPPED)
    target = _target(memory, known)
    model_folder(name)  # what can be said at once is said before a model is loaded
    with warnings_in_one_line(), _connected(target) as client, SessionLog.open(folder, session) as log:
        from model_worker.cli.chat import ChatSettings, run_chat

        settings = ChatSettings(
            target,
            name,
            window,
            local,
            top_k,
            compressor,
            max_new_tokens,
            temperature,
            seed,
            style,
            strict,
            plain,
        )
        run_chat(log, client, settings)


def _place(sessions: Path | None, *, may_be_missing: bool = False) -> Path:
    """The folder of the sessions. Raises SessionError for one that was named and is not there, or is a file."""
    if sessions is None:
        return sessions_folder()
    if not sessions.is_dir() and (sessions.exists() or not may_be_missing):
        raise SessionError(
            f"{sessions} is a file: --sessions is a folder" if sessions.exists() else f"there is no folder {sessions}"
        )
    return sessions


@contextmanager
def _connected(target: str) -> Iterator[kvbank.Client]:
    """A client whose service has answered. Raises SessionError, with what to do, for a folder that another serves."""
    try:
        client = kvbank.connect(target)
    except kvbank.Unavailable as error:
        if not isinstance(kvbank.parse_target(target), Path):
            raise
        raise SessionError(
            f"{error}; to talk in several places, serve the folder to all: kvbank serve --data {shlex.quote(target)} "
            "--listen 127.0.0.1:7400, then in each: kvbank chat --memory 127.0.0.1:7400"
        ) from None
    with client:
        client.server_info(timeout=_START_S)
        yield client


def list_sessions(sessions: Sessions = None, as_json: AsJson = False) -> None:
    """List the sessions on this machine.

    Example: kvbank session ls --json
    """
    folder = _place(sessions)
    with warnings_in_one_line():
        found = [_facts(*session) for session in read_sessions(folder)]
    if left := len(noted(folder)):
        say(f"banks of deleted sessions that are still there: {left}; kvbank session clean")
    if as_json:
        print_json(found)
        return
    figures = [(f"{facts['turns']:,}", f"{facts['tokens']:,}") for facts in found]
    rows = [
        (facts["name"], *pair, facts["last"], Path(facts["model"]).name, facts["memory"])
        for facts, pair in zip(found, figures, strict=True)
    ]
    print_table(_SESSIONS, rows)


def show_session(
    name: Name,
    last: Annotated[int, typer.Option(min=0, max=LARGEST_COUNT, help="How many turns to show.")] = 5,
    sessions: Sessions = None,
    as_json: AsJson = False,
) -> None:
    """Show a session: where it stands, and what was said last.

    Example: kvbank session show diary --last 20
    """
    header, turns = read_session(_place(sessions), name)
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


def fork_session(
    name: Name,
    new: Annotated[str, typer.Argument(help="Name of the new session.")],
    sessions: Sessions = None,
    as_json: AsJson = False,
) -> None:
    """Begin a session with what was said in another; its bank is written from the log at its first start.

    Example: kvbank session fork diary draft
    """
    made = fork(_place(sessions), name, new)
    if as_json:
        print_json(asdict(made))
    else:
        print_line(f"session {new} goes on from {name}; its bank is {made.bank}")


def remove_session(
    name: Name,
    memory: Memory = None,
    sessions: Sessions = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Delete the log even where its bank is not found, or the service is away.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a session: its bank, then its log. A bank that --force leaves is noted for `session clean`.

    Example: kvbank session rm diary
    """
    folder = _place(sessions)
    with SessionLog.open(folder, name, must_exist=True) as log:
        turns = sum(not turn.part for turn in log.turns)
        bank = log.header.bank if log.header else None
        if not yes:
            typer.confirm(f"Delete session {name!r}, its {turns} turns and bank {bank}?", abort=True, err=True)
        epochs = known_epochs(log.epoch)
        left = None if log.header is None else _remove_bank(log.header, epochs, _target(memory, log.header), force)
        if left is not None and left.memory:
            note(folder, LeftBank(str(bank), left.memory, name, now(), epochs))
        log.remove()
    if as_json:
        print_json({"deleted": name, "turns": turns, "bank": bank, "bank_deleted": left is None and bank is not None})
    else:
        print_line(f"deleted session {name}, {turns} turns" + (f", bank {bank}" if left is None else ""))
    if left is not None:
        say(left.text)


def clean_sessions(sessions: Sessions = None, as_json: AsJson = False) -> None:
    """Delete the banks that deleted sessions have left, where their services are there again.

    Ends with 1 where one is still there.

    Example: kvbank session clean
    """
    found = list(delete_noted(_place(sessions)))
    for left, trouble in found:
        if trouble:
            say(f"bank {left.bank} of session {left.session} is still there: {trouble}")
        elif not as_json:
            print_line(f"deleted bank {left.bank} of session {left.session}")
    if as_json:
        print_json([{"session": left.session, "bank": left.bank, "deleted": not trouble} for left, trouble in found])
    if any(trouble for _, trouble in found):
        raise typer.Exit(1)


def _remove_bank(header: Header, epochs: list[str], target: str, force: bool) -> _Left | None:
    """Delete a session's bank; with `force` what is left of it where it is not to be had, or is another copy's."""
    bank = header.bank
    try:
        with kvbank.connect(target, timeout=3, first_contact=1) as client:
            delete_own(client, bank, epochs)
    except SessionError as error:
        if not force:
            raise SessionError(f"nothing was deleted: {error}; delete the log alone with --force") from None
        return _Left("", f"{error}: it stays")
    except kvbank.KVBankError as error:
        if not force:  # the bank may be elsewhere, and with the log nobody would know of it any more
            raise SessionError(
                f"nothing was deleted, since bank {bank} was not found at {target}: {error}; name its service with "
                "--memory, or delete the log alone with --force"
            ) from None
        if isinstance(error, kvbank.BankNotFound):
            return _Left(header.memory, f"bank {bank} is not at {target}; if it is elsewhere, it is still there")
        return _Left(target, f"bank {bank} was not deleted: {error}; `kvbank session clean` deletes it later")
    return None


def _known(sessions: Path, name: str) -> Header | None:
    found = find_session(sessions, name)
    return found[0] if found else None


def _target(memory: str | None, known: Header | None) -> str:
    """The service to talk to. A folder is noted by its absolute path: a session outlives the working directory."""
    if memory is None and known is not None:
        return known.memory
    if memory is None:
        import platformdirs

        folder = Path(platformdirs.user_data_dir("kvbank")) / "memory"
        folder.parent.mkdir(parents=True, exist_ok=True)
        return str(folder)
    parsed = kvbank.parse_target(memory)
    return str(parsed.resolve()) if isinstance(parsed, Path) else parsed


def _facts(header: Header, turns: list[Turn]) -> dict[str, Any]:
    facts = asdict(header)
    tokens = sum(len(turn.ids) for turn in turns)
    said = [turn for turn in turns if not turn.part]
    return {**facts, "turns": len(said), "tokens": tokens, "last": turns[-1].time if turns else header.created}
