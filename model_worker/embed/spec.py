"""What a user writes of an embedder becomes here the embedder that it names."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from kvbank.embed.lexical import LEXICAL, is_lexical, lexical
from model_worker.arguments import of_kind, whole
from model_worker.attachment.model_names import lasting
from model_worker.embed.base import Embedder, input_errors
from model_worker.embed.callable import CallableEmbedder
from model_worker.embed.encoder import EncoderEmbedder
from model_worker.embed.hub import encoder_folder
from model_worker.embed.hybrid import WEIGHT, HybridEmbedder
from model_worker.errors import InputError

# What an embedder may be given as: a name, a folder, a function with a `digest`, or an embedder.
AnyEmbedder: TypeAlias = str | os.PathLike[str] | Embedder | Callable[[list[str]], Any]

_WEIGHT = re.compile(r"(?P<parts>.*),w=(?P<weight>[0-9.]+)")


def embedder(spec: AnyEmbedder) -> Embedder:
    """Make the embedder of a name, or of an encoder's folder; an embedder comes back as it is.

    spec: `lexical`, `lexical:d=4096` (the dimension), `lexical:idf`, `lexical:idf,d=4096`, `hybrid:A+B` and
    `hybrid:A+B,w=0.4` (of two others, and the weight of the first), an encoder's folder, name or hub id, or a function
    that has a `digest`. Raises InputError for a name or an object that is none, ModelNotFound for an encoder that is
    not there.
    """
    if isinstance(spec, os.PathLike):
        return EncoderEmbedder(Path(spec))
    if not isinstance(spec, str):
        return _of_object(spec)
    if is_lexical(spec):
        with input_errors():
            return lexical(spec)
    if spec.startswith("hybrid:"):
        return _hybrid(spec)
    return EncoderEmbedder(encoder_folder(spec))


def lasting_spec(spec: str) -> str:
    """Return a spec that names the same embedder from another working directory: folders by their absolute paths."""
    if spec.startswith("hybrid:"):
        parts, comma, weight = spec.removeprefix("hybrid:").partition(",w=")
        return f"hybrid:{'+'.join(map(lasting_spec, parts.split('+')))}{comma}{weight}"
    return spec if LEXICAL.fullmatch(spec) else lasting(spec)


def _of_object(given: Any) -> Embedder:
    """Return an embedder as it is, and a function that has a digest as an embedder. Raises InputError."""
    missing = [name for name in ("embed", "dimension", "digest") if not hasattr(given, name)]
    if not missing:
        whole("dimension of the embedder", given.dimension)
        if not of_kind("digest of the embedder", given.digest, str).strip():
            raise InputError("digest of the embedder is empty: a bank remembers the embedder by it")
        found: Embedder = given
        return found
    if not callable(given) or isinstance(given, type):
        raise InputError(f"embed is a string, a path or an embedder; a {type(given).__name__} has no {missing[0]}")
    digest, name = getattr(given, "digest", None), getattr(given, "name", None) or getattr(given, "__name__", None)
    if not isinstance(digest, str):
        raise InputError(
            "embed is a function without a name that a bank could remember it by: "
            "give CallableEmbedder(function, name=NAME)"
        )
    return CallableEmbedder(given, name=str(name or digest), digest=digest)


def _hybrid(spec: str) -> HybridEmbedder:
    """Make the hybrid of a spec; a part with a plus, or with a comma if it is not lexical, is refused as ambiguous."""
    parts, weight = spec.removeprefix("hybrid:"), WEIGHT
    if match := _WEIGHT.fullmatch(parts):
        parts, weight = match["parts"], _number(spec, match["weight"])
    names = parts.split("+")
    if len(names) != 2 or not all(names) or any("," in name and not LEXICAL.fullmatch(name) for name in names):
        raise InputError(
            f"embedder {spec!r}: write hybrid:A+B or hybrid:A+B,w=WEIGHT; for a folder with + or , in its name use "
            "HybridEmbedder"
        )
    if any(name.startswith("hybrid:") for name in names):
        raise InputError(f"embedder {spec!r}: a part of a hybrid is no hybrid")
    return HybridEmbedder(embedder(names[0]), embedder(names[1]), weight)


def _number(spec: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"embedder {spec!r}: the weight {text!r} is no number") from None
