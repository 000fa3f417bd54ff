"""Compressors by name: `none`, `tova:m=64`. Adding a method is one file and one line in REGISTRY."""

import re
from dataclasses import fields

from model_worker.compress.base import Compressor, Payload
from model_worker.compress.none import Keep
from model_worker.compress.tova import Tova
from model_worker.errors import InputError

REGISTRY: dict[str, type[Compressor]] = {method.name: method for method in (Keep, Tova)}

__all__ = ["REGISTRY", "Compressor", "Payload", "compressor", "usage"]


def compressor(spec: str) -> Compressor:
    """The compressor that `name` or `name:parameter=value,...` asks for."""
    name, _, rest = spec.partition(":")
    if name not in REGISTRY:
        raise InputError(f"unknown compressor {name!r}; there are: {', '.join(map(usage, REGISTRY))}")
    parameters = [f.name for f in fields(REGISTRY[name])]  # type: ignore[arg-type]
    given = [re.fullmatch(r"(\w+)=(\d+)", item.strip()) for item in rest.split(",")] if rest else []
    values = {match[1]: int(match[2]) for match in given if match}
    if None in given or len(given) != len(values) or sorted(values) != sorted(parameters):
        raise InputError(f"compressor {spec!r}: write {usage(name)}")
    return REGISTRY[name](**values)


def usage(name: str) -> str:
    """How to ask for a method, e.g. `tova:m=N`."""
    parameters = ",".join(f"{f.name}=N" for f in fields(REGISTRY[name]))  # type: ignore[arg-type]
    return f"{name}:{parameters}" if parameters else name
