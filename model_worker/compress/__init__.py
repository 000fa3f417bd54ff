"""Compressors by name: `none`, `tova:m=64`, `homer:m=64,leaf=256`.

Adding a method is one file and one line in REGISTRY (see CONTRIBUTING.md).
"""

import math
import re
import types
from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

from model_worker.compress.base import Compressor, Payload
from model_worker.compress.h2o import HeavyHitters
from model_worker.compress.homer import Homer
from model_worker.compress.icae import Autoencoder
from model_worker.compress.none import Keep
from model_worker.compress.press import Press
from model_worker.compress.random import Random
from model_worker.compress.sinks import Sinks
from model_worker.compress.tova import Tova
from model_worker.compress.window import Window
from model_worker.errors import InputError
from model_worker.window.local import TovaRule

REGISTRY: dict[str, type[Compressor]] = {
    method.name: method for method in (Keep, Tova, Homer, HeavyHitters, Window, Sinks, Random, Press, Autoencoder)
}

__all__ = ["REGISTRY", "Compressor", "Payload", "compressor", "local_rule", "usage"]


def compressor(spec: str) -> Compressor:
    """The compressor that `name` or `name:parameter=value,...` asks for; the first parameter may go without its name.

    Raises InputError, with how to write it, for a name or parameter that does not exist.
    """
    name, _, rest = spec.partition(":")
    if name not in REGISTRY:
        raise InputError(f"unknown compressor {name!r}; there are: {', '.join(map(usage, REGISTRY))}")
    method = REGISTRY[name]
    hints = get_type_hints(method)
    own = [f for f in fields(method) if f.name != "more"]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    more: dict[str, str] = {}
    for position, item in enumerate(rest.split(",") if rest else []):
        key, equals, text = item.strip().partition("=")
        if not equals and position == 0 and own:
            key, text = own[0].name, key
        if method.takes_more and key not in {f.name for f in own} | more.keys() and key.isidentifier() and text:
            more[key] = text
            continue
        if key in values or key not in {f.name for f in own} or not _fits(text, hints[key]):
            raise InputError(f"compressor {spec!r}: write {usage(name)}")
        values[key] = _value(text, hints[key])
    if more:
        values["more"] = tuple(more.items())
    if any(f.default is MISSING and f.name not in values for f in own):
        raise InputError(f"compressor {spec!r}: write {usage(name)}")
    return method(**values)


def local_rule(spec: str | None) -> TovaRule | None:
    """The rule of a cache at decode time that `tova:m=N` asks for, with its observer and heads."""
    if spec is None:
        return None
    method = compressor(spec)
    if not isinstance(method, Tova) or method.block is not None:
        raise InputError(f"local {spec!r}: write {Tova.name}:m=N[,observer=last][,heads=shared]")
    return method.rule


def usage(name: str) -> str:
    """How to ask for a method, e.g. `window:m=N`."""
    return REGISTRY[name].usage()


_FORMS = {int: r"\d+", float: r"\d+(\.\d+)?(e[+-]?\d+)?", str: r".+"}


def _kind(hint: Any) -> Any:
    """`int` of `int | None`."""
    return next(t for t in get_args(hint) if t is not types.NoneType) if isinstance(hint, types.UnionType) else hint


def _fits(text: str, hint: Any) -> bool:
    kind = _kind(hint)
    return re.fullmatch(_FORMS[kind], text) is not None and (kind is not float or math.isfinite(float(text)))


def _value(text: str, hint: Any) -> Any:
    return _kind(hint)(text)
