"""`kvbank chat` and `kvbank session`. Cheap to import: what is heavy comes inside the commands."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import kvbank
from kvbank._channel import parse_target
from kvbank._cli.output import print_json, print_line
from kvbank._cli.table import Column, print_table
from model_worker.errors import SessionError
from model_worker.session_log import (
    Header,
    SessionLog,
    Turn,
    find_session,
    read_session,
    read_sessions,
    sessions_folder,
)
from model_worker.terminal import printable, warnings_in_one_line

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

_SESSIONS = (
    Column("name", "name"),
    *map(Column, ("turns", "tokens")),
    Column("last said", "word"),
    *(Column(title, "name") for title in ("model", "memory")),
)


def register_session_commands(app: typer.Typer) -> None:
    """Add `chat` and `session ls|show|rm` to the `kvbank` command line."""
    session = typer.Typer(no_args_is_help=True, help="Look at chat sessions and delete them.")
    app.command("chat")(chat)
    session.command("ls")(list_sessions)
    session.command("show")(show_session)
    session.command("rm")(remove_session)
    app.add_typer(session, name="session")


def chat(
    session: Annotated[str, typer.Option("--session", "-s", help="Name of the session; a new one begins.")] = "default",
    memory: Memory = None,
    model: Annotated[
        str | None,
        typer.Option(help="kvbank-small (shipped), a model folder, or a hub id; by default the session's own."),
    ] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Local tokens; the rest is in the bank.")] = None,
    local: Annotated[
        str | None, typer.Option(help="What each layer keeps of the local tokens: tova:m=N; by default the window.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Chunks a recall.")] = None,
    compressor: Annotated[str, typer.Option(help="How chunks are compressed, e.g. tova:m=48.")] = "none",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    style: Annotated[
        str, typer.Option("--format", help="Prompt: auto, template (the model's), plain (User: ...) or continue.")
    ] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="End when the memory service is away.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Print answers only.")] = False,
    sessions: Sessions = None,
) -> None:
    """Talk to a model that remembers, also after it was started again."""
    folder = sessions or sessions_folder()
    known = _known(folder, session)
    name = model or (known.model if known else "kvbank-small")
    target = _target(memory, known)
    from model_worker.chat import ChatSettings, run_chat

    run_chat(
        ChatSettings(
            session,
            folder,
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
    )


def list_sessions(sessions: Sessions = None, as_json: AsJson = False) -> None:
    """List the sessions on this machine."""
    with warnings_in_one_line():
        found = [_facts(*session) for session in read_sessions(sessions or sessions_folder())]
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
    last: Annotated[int, typer.Option(min=0, help="How many turns to show.")] = 5,
    sessions: Sessions = None,
    as_json: AsJson = False,
) -> None:
    """Show a session: where it stands, and what was said last."""
    header, turns = read_session(sessions or sessions_folder(), name)
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
    """Delete a session: its bank, then its log."""
    with SessionLog.open(sessions or sessions_folder(), name, must_exist=True) as log:
        turns = sum(not turn.part for turn in log.turns)
        bank = log.header.bank if log.header else None
        if not yes:
            typer.confirm(f"Delete session {name!r}, its {turns} turns and bank {bank}?", abort=True, err=True)
        if bank is not None:
            _remove_bank(bank, _target(memory, log.header), force)
        log.remove()
    if as_json:
        print_json({"deleted": name, "turns": turns, "bank": bank})
    else:
        print_line(f"deleted session {name}, {turns} turns, bank {bank}")


def _remove_bank(bank: str, target: str, force: bool) -> None:
    try:
        with kvbank.connect(target, timeout=3) as client:
            client.delete_bank(bank)
    except (kvbank.BankNotFound, kvbank.Unavailable, kvbank.DeadlineExceeded) as error:
        if not force:  # the bank may be elsewhere, and with the log nobody would know of it any more
            raise SessionError(
                f"nothing was deleted, since bank {bank} was not found at {target}: {error}; name its service with "
                "--memory, or delete the log alone with --force"
            ) from None


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
    parsed = parse_target(memory)
    return str(parsed.resolve()) if isinstance(parsed, Path) else parsed


def _facts(header: Header, turns: list[Turn]) -> dict[str, Any]:
    facts = asdict(header)
    tokens = sum(len(turn.ids) for turn in turns)
    said = [turn for turn in turns if not turn.part]
    return {**facts, "turns": len(said), "tokens": tokens, "last": turns[-1].time if turns else header.created}
