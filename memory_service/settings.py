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
    durability: Literal["fsync", "os"] = "fsync"
    min_free: int = Field(256 * MIB, ge=0)
    max_message_bytes: int = Field(64 * MIB, ge=4 * MIB)
    max_chunk_bytes: int = Field(64 * MIB, ge=1)
    max_unacknowledged_bytes: int = Field(32 * MIB, ge=1)
    max_answer_bytes: int = Field(256 * MIB, ge=1)
    storage_threads: int = Field(8, ge=1, le=256)
    grace: float = Field(5.0, ge=0)
    migrate: bool = False
