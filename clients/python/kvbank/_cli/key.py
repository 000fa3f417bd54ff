"""The commands of `kvbank key` make, list, revoke and rotate the keys of a memory service. This file owns that a secret
is told once, and to whom it was asked for: on stdout, or in a file of its owner."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TextIO

import typer

import kvbank
from kvbank._cli import common, parse
from kvbank._cli.common import AsJson, Service
from kvbank.console.ending import say
from kvbank.console.options import spread
from kvbank.console.output import print_json, print_line, printable
from kvbank.console.table import Column, print_table
from kvbank.files import private

_KEYS = (
    Column("id", "word"),
    Column("tenant", "name"),
    Column("role", "word"),
    Column("banks", "name"),
    *(Column(title, "word") for title in ("created", "last used", "state")),
)

KeyId = Annotated[str, typer.Argument(metavar="ID", help="Id of the key, as `kvbank key ls` shows it.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Write the key into a new file that only you can read, and print no secret."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

app = typer.Typer(no_args_is_help=True, help="Make, list, revoke and rotate keys.")


@app.command("create")
@spread
def create_key(
    role: Annotated[
        Literal["read", "write", "admin", "operator"],
        typer.Option("--role", help="read; write: read too; admin: write and manage keys too; operator: no data."),
    ],
    service: Service,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Whose key it is; your own by default.")] = None,
    banks: Annotated[
        list[str] | None,
        typer.Option("--bank", metavar="PATTERN", help="Banks that it may use, such as 'team-*'; all by default."),
    ] = None,
    ttl: Annotated[
        str | None, typer.Option("--ttl", help="Life of the key: 12h, 30d, 2w; for ever by default.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, and show its secret, which is told only now.

    As soon as a service has a key, every call over TCP needs one; over a unix
    socket, and for the owner of a folder, none is needed. The first key is
    made there, or over the loopback: kvbank key create --memory ./folder

    Example: kvbank key create --role write --bank 'team-*' --ttl 90d
    """
    life = None if ttl is None else parse.span(ttl)
    with _opened(out) as file, service.connect() as client:
        made = client.access.create_key(role, tenant=tenant, banks=banks or None, ttl=life)
        _tell(made, file, as_json)


@app.command("ls")
@spread
def list_keys(
    service: Service,
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Keys of this tenant; of your own, or of all for an operator.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List keys, without their secrets, oldest first.

    Example: kvbank key ls --tenant research
    """
    with service.connect() as client:
        keys = list(client.access.list_keys(tenant))
    if as_json:
        print_json([asdict(key) for key in keys])
        return
    rows = (
        (
            key.key_id,
            key.tenant,
            key.role,
            " ".join(key.banks),
            common.moment(key.create_time),
            common.moment(key.last_use_time),
            _state(key),
        )
        for key in keys
    )
    print_table(_KEYS, rows)


@app.command("revoke")
@spread
def revoke_key(key_id: KeyId, service: Service, yes: Yes = False, as_json: AsJson = False) -> None:
    """Revoke a key for good: its calls, those under way too, are refused within 60 s.

    Example: kvbank key revoke 3HoDP0DI
    """
    _ask(yes, f"Revoke key {printable(key_id)!r} for good?")
    with service.connect() as client:
        key = client.access.revoke_key(key_id)
    if as_json:
        print_json(asdict(key))
    else:
        print_line(f"revoked {key.key_id} ({key.role} of {key.tenant})")


@app.command("rotate")
@spread
def rotate_key(
    key_id: KeyId,
    service: Service,
    overlap: Annotated[
        str | None,
        typer.Option("--overlap", help="How long the old key is still taken, such as 1h; not at all by default."),
    ] = None,
    out: Out = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make a key in the place of another, of the same tenant, role, banks and life.

    Example: kvbank key rotate 3HoDP0DI --overlap 1d
    """
    span = None if overlap is None else parse.span(overlap)
    if not span:
        _ask(yes, f"Refuse key {printable(key_id)!r} from now on?")
    with _opened(out) as file, service.connect() as client:
        made = client.access.rotate_key(key_id, overlap=span)
        _tell(made, file, as_json)


def _ask(yes: bool, question: str) -> None:
    if not yes:
        typer.confirm(question, abort=True, err=True)


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO | None]:
    """Open the file for a new key before there is one, so that no secret is lost to a file that cannot be written;
    without a file yield None. The file is removed where it got no key; one that has a key stays, whatever comes
    after that, because it is told nowhere else."""
    if out is None:
        yield None
        return
    with open(out, "x", opener=private.opener) as file:
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                out.unlink(missing_ok=True)


def _tell(made: "kvbank.NewApiKey", file: TextIO | None, as_json: bool) -> None:
    """Tell of a new key; its secret is written to a file, or printed where there is none."""
    if file is not None:
        file.write(f"{made.secret}\n")
        file.flush()
    if as_json:
        print_json({**({} if file else {"secret": made.secret}), **asdict(made.key)})
        return
    key = made.key
    _line("key", f"in {file.name}" if file else made.secret)
    _line("id", key.key_id)
    _line("tenant", key.tenant)
    _line("role", key.role)
    _line("banks", " ".join(key.banks))
    _line("expires", common.moment(key.expire_time))
    if made.replaced is not None:
        _line(
            "replaces", f"{made.replaced.key_id}, which is refused from {common.moment(made.replaced.revoke_time)} on"
        )
    if file is None:
        say("the key is shown only now; keep it where others cannot read it")


def _line(label: str, text: str) -> None:
    print_line(f"{label:10} {text}".rstrip())


def _state(key: "kvbank.ApiKey") -> str:
    """Say whether a key is taken, and until when."""
    ends = [(time, what) for time, what in ((key.revoke_time, "revoked"), (key.expire_time, "expired")) if time]
    if not ends:
        return "valid"
    time, what = min(ends)
    return what if time <= datetime.now(UTC) else f"valid until {common.moment(time)}"
