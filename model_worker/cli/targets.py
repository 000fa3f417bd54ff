"""A command that talks finds here what it talks to: the service, and the session in it.

The module is light to import: no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

import kvbank
from kvbank.files import private
from model_worker.errors import SessionError
from model_worker.session.holder import has_died, shown

Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        "-m",
        envvar="KVBANK_MEMORY",
        help="Memory service: HOST:PORT[,HOST:PORT], unix:PATH or a folder. By default a folder of yours.",
    ),
]

# Seconds for a first answer, so that a service that is not there is noticed before a model is loaded.
_START_S = 3.0
_DEFAULT = "default"


def target_of(memory: str | None) -> str:
    """Return the service to talk to: the one that was named, else a folder of the user's, which is made."""
    if memory is None:
        import platformdirs

        folder = Path(platformdirs.user_data_dir("kvbank")) / "memory"
        private.make_folder(folder.parent)
        return str(folder)
    parsed = kvbank.parse_target(memory)
    return str(parsed.resolve()) if isinstance(parsed, Path) else parsed


@contextmanager
def connected(target: str, api_key: str | None) -> Iterator[kvbank.Client]:
    """Connect a client and wait for the first answer of its service. api_key: see `kvbank.ConnectOptions`.

    Raises SessionError, with what to do, for a folder that another process serves.
    """
    try:
        client = kvbank.connect(target, api_key=api_key)
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


def session_of(client: kvbank.Client, target: str, name: str | None) -> tuple[str, kvbank.Session | None]:
    """Return the name of the session to talk in, and the session, None where it is to be begun.

    target: the service. name: of the session; None is the first of `default`, `default-2` and so on that no other
    process has. Raises SessionError for a session that another process has, and for one that an earlier release left in
    a folder.
    """
    if name is not None:
        known = _found(client, target, name)
        if known is not None and known.lease is not None and not has_died(known.lease.holder):
            raise in_use(name, known.lease.holder)
        return name, known
    for number in count(1):
        free = _DEFAULT if number == 1 else f"{_DEFAULT}-{number}"
        known = _found(client, target, free)
        if known is None or known.lease is None or has_died(known.lease.holder):
            return free, known
    raise AssertionError("numbers end")


def embedder_of_banks(client: kvbank.Client, names: Iterable[str]) -> str | None:
    """Return the embedder of the first of some banks that says by which one it is searched, so that what goes with them
    has the same one; None where none says it. Raises kvbank.BankNotFound."""
    return next(filter(None, [_embedder_of(client.get_bank(name)) for name in names]), None)


def _embedder_of(bank: kvbank.Bank) -> str | None:
    if "embedder" in bank.metadata:
        return str(bank.metadata["embedder"])
    from kvbank.embed import name_of
    from kvbank.embed.spec import of_digest

    lexical = of_digest(bank.embedding.embedder_digest, bank.embedding.dimension)
    return None if lexical is None else name_of(lexical)


def in_use(name: str, holder: str) -> SessionError:
    """Return the error of a session that another process has."""
    return SessionError(
        f"session {name!r} is in use by {shown(holder)}; it is free once that ends, or half a minute after it was lost"
    )


def _found(client: kvbank.Client, target: str, name: str) -> kvbank.Session | None:
    try:
        return client.sessions.get(name=name)
    except kvbank.SessionNotFound:
        folder = _earlier(name)
        if folder is None:
            return None
        raise SessionError(
            f"session {name!r} of an earlier release is in a folder; take it over: kvbank session import "
            f"{shlex.quote(str(folder))} --memory {shlex.quote(target)}"
        ) from None


def _earlier(name: str) -> Path | None:
    """Return the folder in which an earlier release kept the session of a name, if it is there."""
    import platformdirs

    sessions = Path(platformdirs.user_state_dir("kvbank")) / "sessions"
    folder = sessions / name
    return folder if folder.parent == sessions and (folder / "log.jsonl").is_file() else None
