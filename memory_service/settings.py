"""All settings of the service in one typed object; precedence: argument (flag), environment KVBANK_*, default."""

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvbank.console import quantities

MIB = 1024 * 1024
LONGEST_SOCKET_PATH = 107
PREFIX = "KVBANK_"
# Variables of the command line and of its other parts.
_OTHERS = ("KVBANK_MEMORY", "KVBANK_DEBUG")


def _written(read: Callable[[str], Any]) -> BeforeValidator:
    return BeforeValidator(lambda value: read(value) if isinstance(value, str) else value)


def _absolute(listen: str) -> str:
    """The path of a unix socket, for clients that go to another folder; as it is where it would be too long for one."""
    if not listen.startswith("unix:"):
        return listen
    path = os.path.abspath(listen.removeprefix("unix:"))
    return f"unix:{path}" if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH else listen


Amount = Annotated[int, _written(quantities.amount)]
Seconds = Annotated[float, _written(quantities.seconds), Field(allow_inf_nan=False)]


class Settings(BaseSettings):
    """Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid")

    # Resolved once: a process that goes to another folder afterwards still has this one.
    data: Annotated[Path, AfterValidator(lambda path: Path(os.path.realpath(path)))]
    listen: Annotated[str, AfterValidator(_absolute)] = "127.0.0.1:7400"
    insecure: bool = False
    # Clients of this machine may read payload files and stage their own; on a unix socket only.
    same_host: bool = False
    durability: Literal["fsync", "os"] = "fsync"
    min_free: Amount = Field(256 * MIB, ge=0)
    max_message_bytes: Amount = Field(64 * MIB, ge=4 * MIB, lt=2 * 1024 * MIB)
    max_chunk_bytes: Amount = Field(64 * MIB, ge=1)
    max_unacknowledged_bytes: Amount = Field(32 * MIB, ge=1)
    # In memory, of all streams together: what is being written, and as much of what is being read.
    max_inflight_bytes: Amount = Field(256 * MIB, ge=1)
    max_answer_bytes: Amount = Field(256 * MIB, ge=1)
    # Of callers; fewer where the system allows the process fewer descriptors, of which some are kept for files.
    max_connections: Amount = Field(1000, ge=1)
    # Under way, of all callers together.
    max_calls: Amount = Field(1000, ge=4)
    max_banks: Amount = Field(10_000, ge=1)
    # Of specs and metadata of all banks, which are in memory.
    max_bank_bytes: Amount = Field(64 * MIB, ge=1)
    storage_threads: int = Field(8, ge=1, le=256)
    grace: Seconds = Field(5.0, ge=0)
    # A bank that was not searched for so long leaves memory.
    index_idle: Seconds = Field(900.0, gt=0)
    # From so many chunks on, a bank with the index kind "auto" is searched by lists.
    ivf_from: Amount = Field(200_000, ge=1)
    migrate: bool = False
    # Say over gRPC which methods there are, to tools such as grpcurl.
    reflection: bool = False
    # HOST:PORT of /metrics for Prometheus, /healthz and /readyz; empty: none.
    metrics_listen: str = ""
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class SettingsError(ValueError):
    """A setting is not what it can be; the text is one line that begins with its name, as the caller wrote it."""


def load(given: Mapping[str, Any], name: Callable[[str], str] = str) -> Settings:
    """The settings that are given, and the rest from the environment.

    name: how the caller names a setting, such as a flag. Errors: SettingsError.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
    setting = str(first["loc"][0]) if first["loc"] else ""
    text = first["msg"].removeprefix("Value error, ")
    variable = _variable(setting)
    if setting in given or variable is None:
        raise SettingsError(f"{name(setting)}: {text}")
    raise SettingsError(f"{variable}: {text}")


def unknown_variables() -> Iterator[str]:
    """What to say about each variable of the environment that looks like a setting and is none."""
    known = [*(PREFIX + field.upper() for field in Settings.model_fields), *_OTHERS]
    for variable in sorted(os.environ):
        if variable.upper().startswith(PREFIX) and variable.upper() not in known:
            rest = variable.upper().removeprefix(PREFIX)
            near = difflib.get_close_matches(rest, [each.removeprefix(PREFIX) for each in known], 1)
            yield f"{variable} is no setting" + (f"; did you mean {PREFIX}{near[0]}?" if near else "")


def _variable(setting: str) -> str | None:
    """The environment's, as it is written there."""
    return next((variable for variable in os.environ if variable.upper() == PREFIX + setting.upper()), None)
