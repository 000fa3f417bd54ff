"""Settings of commands and of training runs say here their types, their bounds and their help, field by field.

A settings model derives from `Settings`; flags.py makes flags of its fields, and file.py reads them from TOML. The
module is light to import: no torch.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

# What every generator of random numbers takes, torch's too.
LARGEST_SEED = 2**62
# The largest count: beyond it torch and Python's itertools fail with errors of their own.
LARGEST_COUNT = 2**31 - 1

Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Seed = Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)]


class Settings(BaseModel):
    """The base of every settings model: values do not change, and a name that is no field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


def described(text: str, *, panel: str | None = None, flag: str | None = None) -> Any:
    """Return what a field has beside its type: its help, the panel that shows the help, a flag of another name."""
    return Field(description=text, json_schema_extra={"panel": panel, "flag": flag})


def at_least(least: int, most: int = LARGEST_COUNT) -> Any:
    """Return the bounds of a count that begins above 1."""
    return Field(ge=least, le=most)


ModelName = Annotated[str, described("kvbank-small (shipped), smollm2, a model folder, or a hub id.")]
Rope = Annotated[str | None, described("Rope scaling: linear:F, ntk:F or yarn:F, for F times the trained length.")]
Device = Annotated[str, described("auto, cpu, cuda.")]
Compressor = Annotated[str, described("How chunks are compressed, e.g. tova:m=48.")]
