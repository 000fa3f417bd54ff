"""All settings of the service in one typed object; precedence: argument (flag), environment KVBANK_*, default."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


class Settings(BaseSettings):
    """Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="KVBANK_", extra="forbid")

    data: Path
    listen: str = "127.0.0.1:7400"
    insecure: bool = False
    # Clients of this machine may read payload files and stage their own; on a unix socket only.
    same_host: bool = False
    durability: Literal["fsync", "os"] = "fsync"
    min_free: int = Field(256 * MIB, ge=0)
    max_message_bytes: int = Field(64 * MIB, ge=4 * MIB, lt=2 * 1024 * MIB)
    max_chunk_bytes: int = Field(64 * MIB, ge=1)
    max_unacknowledged_bytes: int = Field(32 * MIB, ge=1)
    # In memory, of all streams together: what is being written, and as much of what is being read.
    max_inflight_bytes: int = Field(256 * MIB, ge=1)
    max_answer_bytes: int = Field(256 * MIB, ge=1)
    # Of callers; fewer where the system allows the process fewer descriptors, of which some are kept for files.
    max_connections: int = Field(1000, ge=1)
    # Under way, of all callers together.
    max_calls: int = Field(1000, ge=4)
    max_banks: int = Field(10_000, ge=1)
    # Of specs and metadata of all banks, which are in memory.
    max_bank_bytes: int = Field(64 * MIB, ge=1)
    storage_threads: int = Field(8, ge=1, le=256)
    grace: float = Field(5.0, ge=0)
    # A bank that was not searched for so long leaves memory.
    index_idle: float = Field(900.0, gt=0)
    # From so many chunks on, a bank with the index kind "auto" is searched by lists.
    ivf_from: int = Field(200_000, ge=1)
    migrate: bool = False
    # Say over gRPC which methods there are, to tools such as grpcurl.
    reflection: bool = False
    # HOST:PORT of /metrics for Prometheus, /healthz and /readyz; empty: none.
    metrics_listen: str = ""
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
