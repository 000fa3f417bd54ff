"""The compressors by name: `none`, `tova:m=64`, `homer:m=64,leaf=256`.

Adding a method is one file and one line in REGISTRY (see CONTRIBUTING.md).
"""

from model_worker.compress.base import Compressor, Payload
from model_worker.compress.h2o import HeavyHitters
from model_worker.compress.homer import Homer
from model_worker.compress.icae import Autoencoder
from model_worker.compress.none import Keep
from model_worker.compress.press import Press
from model_worker.compress.random import Random
from model_worker.compress.sinks import Sinks
from model_worker.compress.spec import parse
from model_worker.compress.tova import Tova
from model_worker.compress.window import Window
from model_worker.errors import InputError
from model_worker.window.tova import TovaRule

REGISTRY: dict[str, type[Compressor]] = {
    method.name: method for method in (Keep, Tova, Homer, HeavyHitters, Window, Sinks, Random, Press, Autoencoder)
}

__all__ = ["REGISTRY", "Compressor", "Payload", "compressor", "local_rule", "usage"]


def compressor(spec: str) -> Compressor:
    """Return the compressor that `name` or `name:parameter=value,...` asks for; the first parameter needs no name.

    Raises InputError, with how to write it, for a name or parameter that does not exist.
    """
    name = spec.partition(":")[0]
    if name not in REGISTRY:
        raise InputError(f"unknown compressor {name!r}; there are: {', '.join(map(usage, REGISTRY))}")
    try:
        return REGISTRY[name].from_words(parse(spec)[1])
    except InputError:  # of the method itself, which says what it does not take
        raise
    except ValueError:
        raise InputError(f"compressor {spec!r}: write {usage(name)}") from None


def local_rule(spec: str | None) -> TovaRule | None:
    """Return the rule of a cache at decode time that `tova:m=N` asks for, with its observer and heads.

    Raises InputError for another method, and for TOVA in blocks.
    """
    if spec is None:
        return None
    method = compressor(spec)
    if not isinstance(method, Tova) or method.block is not None:
        raise InputError(f"local {spec!r}: write {Tova.name}:m=N[,observer=last][,heads=shared]")
    return method.rule


def usage(name: str) -> str:
    """Say how to ask for a method, e.g. `window:m=N`."""
    return REGISTRY[name].usage()
