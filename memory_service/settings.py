"""All settings of the service in one typed object. This file owns their names, bounds and descriptions, of which the
options of `kvbank serve` and the table in docs/operations.md are made, and their precedence: argument (flag),
environment KVBANK_*, file, default.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvbank.console.quantities import COUNT, SIZE, TIME, Quantity

MIB = 1024 * 1024
# The most bytes of the path of a unix socket, on Linux.
LONGEST_SOCKET_PATH = 107
PREFIX = "KVBANK_"
# How the URL of a database begins.
DATABASES = ("postgresql://", "postgres://")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Variables KVBANK_... that other parts of the command line read.
_OTHERS = (
    *("KVBANK_MEMORY", "KVBANK_SPREAD", "KVBANK_API_KEY", "KVBANK_DEBUG", "KVBANK_CACHE"),
    *("KVBANK_TLS", "KVBANK_TLS_CA", "KVBANK_TLS_CLIENT_CERT", "KVBANK_TLS_CLIENT_KEY", "KVBANK_TLS_SERVER_NAME"),
)


def _read(quantity: Quantity) -> BeforeValidator:
    return BeforeValidator(lambda value: quantity.read(value) if isinstance(value, str) else value)


def _absolute(listen: str) -> str:
    """Return the path of a unix socket for clients that go to another folder; unchanged where it would be too long for
    a socket."""
    if not listen.startswith("unix:"):
        return listen
    path = os.path.abspath(listen.removeprefix("unix:"))
    return f"unix:{path}" if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH else listen


def _whole(path: str) -> str:
    """Return the path of a file for a process that goes to another folder; "" stays so."""
    return path and os.path.abspath(path)


def _text(place: Any) -> Any:
    return os.fspath(place) if isinstance(place, os.PathLike) else place


def is_url(text: str) -> bool:
    """Tell whether a text looks like a URL, and so names no folder."""
    return _URL.match(text) is not None


def _place(data: str) -> str:
    """Return a folder as its resolved path, so that a process that goes to another folder afterwards still has this
    one; the URL of a database stays as it is. Raises ValueError for a URL of another kind, which would be a folder."""
    if data.startswith(DATABASES):
        return data
    if is_url(data):
        raise ValueError(f"{data.partition('://')[0]}:// is no place for data; give a folder, or {DATABASES[0]}...")
    return os.path.realpath(data)


def _source(name: str) -> str:
    """Return an address as it is, and the path of a file as `_whole` does."""
    return name if name.startswith(("https://", "http://")) else _whole(name)


def _parts(value: Any) -> Any:
    """Return the parts of a variable that has several values; what is no text stays as it is."""
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


Size = Annotated[int, _read(SIZE), SIZE]
Count = Annotated[int, _read(COUNT), COUNT]
Seconds = Annotated[float, _read(TIME), TIME, Field(allow_inf_nan=False)]


class Settings(BaseModel):
    """The settings of a server. Sizes are in bytes, times in seconds; each description is a sentence of the help."""

    model_config = ConfigDict(extra="forbid")

    data: Annotated[str, BeforeValidator(_text), AfterValidator(_place)] = Field(
        description="Data folder, made when missing, or postgresql://USER@HOST/DATABASE."
    )
    objects: str = Field(
        "", description="s3://BUCKET/PREFIX of the payloads where the data are in a database; empty for a folder."
    )
    cache: Annotated[str, AfterValidator(_whole)] = Field(
        "",
        description="Folder for indexes and payloads that were read, where the data are in a database; empty: that of "
        "the user's caches.",
    )
    cache_bytes: Size = Field(8 * 1024 * MIB, ge=64 * MIB, description="Most payloads in the cache.")
    listen: Annotated[str, AfterValidator(_absolute)] = Field(
        "127.0.0.1:7400", description="HOST:PORT (port 0: any free one) or unix:PATH."
    )
    tls_cert: Annotated[str, AfterValidator(_whole)] = Field(
        "",
        description="File of the certificate (PEM, with those that it was signed by), for TLS on all ports; read anew "
        "when it changes.",
    )
    tls_key: Annotated[str, AfterValidator(_whole)] = Field(
        "", description="File of the certificate's key (PEM, without a password)."
    )
    tls_client_ca: Annotated[str, AfterValidator(_whole)] = Field(
        "", description="File of the authorities (PEM) of which clients must have a certificate; no need where empty."
    )
    tls_client: Annotated[tuple[str, ...], BeforeValidator(_parts)] = Field(
        (),
        description="SAN=TENANT:ROLE: what a client may do whose certificate has this name; may be given several "
        "times, in the variable with commas in between.",
    )
    jwt_jwks: Annotated[str, AfterValidator(_source)] = Field(
        "", description="File, or https address, of the keys (JWKS) by which tokens (JWT) of callers are checked."
    )
    jwt_audience: str = Field("", description="The audience (aud) that tokens must name; it is this service.")
    jwt_issuer: str = Field("", description="The issuer (iss) that tokens must be of; not looked at where empty.")
    jwt_tenant_claim: str = Field("tenant", description="The claim of a token that says the tenant of its caller.")
    jwt_role_claim: str = Field("role", description="The claim of a token that says the role of its caller.")
    insecure: bool = Field(False, description="Allow addresses that others can reach without TLS or without a key.")
    same_host: bool = Field(
        False,
        description="Let clients of this user read payload files and stage their own; on a unix socket only.",
    )
    durability: Literal["fsync", "os"] = Field(
        "fsync",
        description="What a write waits for: the disk (fsync), or the system alone (os), so that a power cut may lose "
        "what was acknowledged last.",
    )
    min_free: Size = Field(
        256 * MIB, ge=0, description="Bytes of the disk that writes leave free; deletes may use them."
    )
    max_message_bytes: Size = Field(
        64 * MIB, ge=4 * MIB, lt=2 * 1024 * MIB, description="Largest gRPC message; from 4 MiB to below 2 GiB."
    )
    max_chunk_bytes: Size = Field(64 * MIB, ge=1, description="Largest payload (all tensors) of a chunk.")
    max_unacknowledged_bytes: Size = Field(
        32 * MIB, ge=1, description="Bytes of one write stream that may be taken and not acknowledged yet."
    )
    max_inflight_bytes: Size = Field(
        256 * MIB,
        ge=1,
        description="Bytes in memory, of all callers together: of writes, as many of K-V that is read, as many of "
        "headers beyond 64 KiB, and as many of requests.",
    )
    max_answer_bytes: Size = Field(256 * MIB, ge=1, description="Most K-V of one answer.")
    max_connections: Count = Field(
        1000,
        ge=1,
        description="Connections of callers; fewer where the system allows the process fewer file descriptors, of "
        "which 768 are kept for files.",
    )
    max_calls: Count = Field(
        1000,
        ge=4,
        description="Calls under way, of all callers together; one connection has at most 256, and one tenant three "
        "quarters.",
    )
    max_banks: Count = Field(
        10_000, ge=1, description="Most banks of the folder; of a folder with more, all are served and none is made."
    )
    max_bank_bytes: Size = Field(
        64 * MIB, ge=1, description="Most specs and metadata of all banks together, which are in memory."
    )
    max_sessions: Count = Field(100_000, ge=1, description="Most sessions of one tenant.")
    storage_threads: int = Field(
        8,
        ge=1,
        le=256,
        description="Threads that read and write, and as many that search; one kind of call has at most three quarters "
        "of the latter.",
    )
    grace: Seconds = Field(5.0, ge=0, description="Time that running calls get when the server stops, such as 30s.")
    index_idle: Seconds = Field(
        900.0, gt=0, description="Time after which the index of a bank that is not searched leaves memory."
    )
    ivf_from: Count = Field(
        200_000, ge=1, description="Chunks from which a bank with the index 'auto' is searched by lists, approximately."
    )
    migrate: bool = Field(False, description="Upgrade an older data folder or database at the start.")
    reflection: bool = Field(False, description="Tell tools such as grpcurl over gRPC which methods there are.")
    metrics_listen: str = Field(
        "", description="HOST:PORT of /metrics for Prometheus, /healthz and /readyz; none where empty."
    )
    record: Annotated[str, AfterValidator(_whole)] = Field(
        "",
        description="File to which is appended, a JSON line each, which chunks are written, retrieved and gone; none "
        "where empty.",
    )
    audit_log: Annotated[str, AfterValidator(_whole)] = Field(
        "",
        description="File to which a JSON line is appended for every call, refused ones too: who did what to which "
        "bank; none where empty.",
    )
    audit_log_bytes: Size = Field(64 * MIB, ge=64 * 1024, description="Size at which the audit log begins a new file.")
    audit_log_files: int = Field(8, ge=1, le=1000, description="Earlier files of the audit log that are kept.")
    log_format: Literal["text", "json"] = Field("text", description="How log lines look; json: one object a line.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged; debug: every request too."
    )

    @property
    def in_database(self) -> bool:
        """Tell whether the data are in a database."""
        return self.data.startswith(DATABASES)

    @property
    def folder(self) -> Path:
        """Return the data folder. Not for data in a database."""
        assert not self.in_database
        return Path(self.data)

    @property
    def place(self) -> str:
        """Return the data folder or the URL of the database, without its password, for people."""
        return re.sub(r"(?<=//)([^/@:]*):[^/@]*@", r"\1@", self.data) if self.in_database else self.data


class SettingsError(ValueError):
    """The error for a setting that is not what it can be; its text is one line that begins with the name of the
    setting, as the caller wrote it."""


def load(given: Mapping[str, Any], name: Callable[[str], str] = str, file: Path | None = None) -> Settings:
    """Return the settings that are given, and the rest from the environment and from a file.

    name: how the caller names a setting, such as a flag. file: a TOML file with settings by name. Errors:
    SettingsError; OSError for a file that cannot be read.
    """
    from_file = {} if file is None else _read_file(file)
    variables = _variables()
    from_environment = {setting: os.environ[variable] for setting, variable in variables.items()}
    try:
        return Settings(**{**from_file, **from_environment, **given})
    except ValidationError as error:
        first = error.errors()[0]
    setting = str(first["loc"][0]) if first["loc"] else ""
    text = first["msg"].removeprefix("Value error, ")
    if setting not in given and setting in variables:
        raise SettingsError(f"{variables[setting]}: {text}")
    if setting not in given and setting in from_file:
        raise SettingsError(f"{file}: {setting}: {text}")
    raise SettingsError(f"{name(setting)}: {text}")


def _read_file(file: Path) -> Mapping[str, Any]:
    """Read the settings of a TOML file. Errors: SettingsError for a file that is no TOML, or has other names."""
    with open(file, "rb") as stream:
        try:
            found = tomllib.load(stream)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"{file}: it is no TOML: {error}") from None
    if unknown := [setting for setting in found if setting not in Settings.model_fields]:
        raise SettingsError(f"{file}: {_unknown(unknown[0], Settings.model_fields)}")
    return found


def unknown_variables() -> Iterator[str]:
    """Yield a sentence about each variable of the environment that looks like a setting and is none."""
    known = [*(PREFIX + field.upper() for field in Settings.model_fields), *_OTHERS]
    for variable in sorted(os.environ):
        if variable.upper().startswith(PREFIX) and variable.upper() not in known:
            yield _unknown(variable, known)


def _unknown(name: str, known: Iterable[str]) -> str:
    """Say that a name is no setting, and which of the known names may have been meant."""
    bare = {each.upper().removeprefix(PREFIX): each for each in known}
    near = difflib.get_close_matches(name.upper().removeprefix(PREFIX), bare, 1)
    return f"{name} is no setting" + (f"; did you mean {bare[near[0]]}?" if near else "")


def _variables() -> dict[str, str]:
    """Return, by setting, the names of the variables that are set, as they are written in the environment."""
    settings = {PREFIX + setting.upper(): setting for setting in Settings.model_fields}
    return {settings[name]: variable for variable in os.environ if (name := variable.upper()) in settings}
