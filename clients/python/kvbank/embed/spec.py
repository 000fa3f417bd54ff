"""What a user writes of an embedder becomes here the embedder that it names."""

import os
from collections.abc import Callable
from typing import Any, TypeAlias

from kvbank._exceptions import MissingExtra
from kvbank.embed.base import Embedder, refused
from kvbank.embed.callable import CallableEmbedder, length
from kvbank.embed.lexical import is_lexical, lexical

# What an embedder may be given as: a name, an encoder's folder, an embedder, or a function with a `digest`.
AnyEmbedder: TypeAlias = str | os.PathLike[str] | Embedder | Callable[[list[str]], Any]


def embedder(spec: AnyEmbedder) -> Embedder:
    """Return the embedder of a name, or of an encoder's folder; an embedder comes back as it is.

    spec: `lexical`, `lexical:d=4096` (the dimension), `lexical:idf` and `lexical:idf,d=4096` need nothing that is not
    installed with the client. `minilm`, any other name, an encoder's folder and `hybrid:A+B` need the worker. A
    function from texts to vectors has a `digest`, by which a bank remembers it, and may have a `dimension`.
    Errors: InvalidArgument; MissingExtra for an encoder where the worker is not installed; those of the worker for an
    encoder that is not there.
    """
    if isinstance(spec, str) and is_lexical(spec):
        return lexical(spec)
    if isinstance(spec, str | os.PathLike):
        return _of_worker(spec)
    return _of_object(spec)


def of_digest(digest: str, dimension: int) -> Embedder | None:
    """Return the lexical embedder that a bank was written with, in any of its forms; None where it was another."""
    join = "" if dimension == 1024 else f"d={dimension}"
    for name in ("lexical", "lexical:idf"):
        made = lexical(f"{name}{',' if name.endswith('idf') and join else ':' if join else ''}{join}")
        for form in (made, *made.earlier()):
            if form.digest == digest:
                return form
    return None


def _of_worker(spec: str | os.PathLike[str]) -> Embedder:
    shown = os.fspath(spec)
    try:
        from model_worker.embed import embedder as of_worker

        made: Embedder = of_worker(spec)
    except ModuleNotFoundError as error:
        text = f"embed={shown!r} needs the worker: pip install 'kvbank[worker]' (no module {error.name!r})"
        raise MissingExtra(text) from None
    return made


def _of_object(given: Any) -> Embedder:
    """Return an embedder as it is, and a function that has a digest as an embedder. Errors: InvalidArgument."""
    missing = [name for name in ("embed", "dimension", "digest") if not hasattr(given, name)]
    if not missing:
        length("dimension of the embedder", given.dimension)
        if not isinstance(given.digest, str) or not given.digest.strip():
            raise refused("digest of the embedder is no text: a bank remembers the embedder by it")
        found: Embedder = given
        return found
    if not callable(given) or isinstance(given, type):
        raise refused(f"embed is a string, a path or an embedder; a {type(given).__name__} has no {missing[0]}")
    digest, name = getattr(given, "digest", None), getattr(given, "name", None) or getattr(given, "__name__", None)
    if not isinstance(digest, str):
        raise refused(
            "embed is a function without a name that a bank could remember it by: "
            "give CallableEmbedder(function, name=NAME)"
        )
    dimension = getattr(given, "dimension", None)
    return CallableEmbedder(given, name=str(name or digest), digest=digest, dimension=dimension)
