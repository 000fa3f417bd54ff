"""A command about sessions finds here what it works on: the folder of the sessions, and the service of one of them.

The module is light to import: no torch.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import kvbank
from kvbank.files import private
from model_worker.errors import SessionError
from model_worker.session.folder import sessions_folder
from model_worker.session.log_format import Header

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

# Seconds for a first answer, so that a service that is not there is noticed before a model is loaded.
_START_S = 3.0


def folder_of(sessions: Path | None, *, may_be_missing: bool = False) -> Path:
    """Return the folder of the sessions: the one that was named, or the user's own.

    Raises SessionError for a folder that was named and is not there, and for a file.
    """
    if sessions is None:
        return sessions_folder()
    if not sessions.is_dir() and (sessions.exists() or not may_be_missing):
        raise SessionError(
            f"{sessions} is a file: --sessions is a folder" if sessions.exists() else f"there is no folder {sessions}"
        )
    return sessions


def target_of(memory: str | None, known: Header | None) -> str:
    """Return the service to talk to: the one that was named, else that of the session, else a folder of the user's.

    A folder is returned by its absolute path, because a session outlives the working directory.
    """
    if memory is None and known is not None:
        return known.memory
    if memory is None:
        import platformdirs

        folder = Path(platformdirs.user_data_dir("kvbank")) / "memory"
        private.make_folder(folder.parent)
        return str(folder)
    parsed = kvbank.parse_target(memory)
    return str(parsed.resolve()) if isinstance(parsed, Path) else parsed


@contextmanager
def connected(target: str, api_key: str | None) -> Iterator["kvbank.Client"]:
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
