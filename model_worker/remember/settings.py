"""The settings of a memory, each with its meaning, its default and its bounds.

This file owns the rule that a setting is checked once, when `MemorySettings` is made: whatever reads the settings
afterwards relies on them.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, TypedDict

import kvbank
from kvbank.wire.scalars import Scalar
from model_worker.arguments import choice, finite, flag, of_kind, whole
from model_worker.compress import Compressor
from model_worker.compress import compressor as compressor_named
from model_worker.embed import AnyEmbedder
from model_worker.embed import embedder as embedder_named
from model_worker.errors import InputError
from model_worker.remember.payload_cache import PayloadCache
from model_worker.remember.spool import Spool

CHUNK, TOP_K = 64, 4
_PATIENCE_S, _STRICT_PATIENCE_S = 2.0, 10.0


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What a `Memory` stores of a text, what it recalls, and how long it waits for its service.

    Names (of an embedder, a compressor) become the objects that they name when the settings are made. Raises InputError
    for a value of another kind or out of its bounds.
    """

    embedder: AnyEmbedder | None = None
    """Turns a text into the vector by which it is found: `lexical`, `lexical:d=N`, `lexical:idf`, `hybrid:A+B`, an
    encoder's folder or hub id, an object with `embed`, `dimension` and `digest`, or a function of texts with a
    `digest`. None: what the model was trained with, else `lexical`."""
    compressor: str | Compressor = "none"
    """What is kept of a chunk, as `kvbank compressors` lists it."""
    chunk: int | None = None
    """Tokens of a chunk. None: what the model was made for, else 64."""
    top_k: int | None = None
    """Chunks that a recall brings. None: what the model was made for, else 4."""
    recent: int | None = None
    """The last chunks that left the window and are always attended to, as they are stored, whether the service answers
    or not; a recall brings others beside them. None: what the model was made for, else 0."""
    order: Literal["time", "score"] | None = None
    """The order in which recalled chunks are attended to: `time` (oldest first, as in MemLong) or `score` (the best
    match last, next to what is read, where an untrained model heeds it most). None: `time` in mode memlong, else
    `score`."""
    cadence: int | None = None
    """Decode steps between two recalls. None: a chunk."""
    ahead: int = 0
    """Decode steps by which a recall is asked for before it is due, with the tokens that are known then, so that the
    model goes on while the service answers; less than `cadence`. 0: it is asked for when it is due, with all tokens,
    and waited for."""
    query_tokens: int | None = None
    """At most so many of the last tokens are the query of a recall. None: a chunk."""
    query: Literal["with_input", "past"] = "with_input"
    """Whether the query includes the tokens about to be processed, as in MemLong, or only the `past` ones; a loss that
    is to be honest needs `past`, since otherwise the answer chooses its memory."""
    context: Literal["isolated", "window"] | None = None
    """Whether a chunk is encoded alone (`isolated`) or stored as it stood in the local window. None: `isolated` in mode
    memlong, `window` in mode per_layer."""
    together: int = 512
    """Tokens of the chunks that one forward reads, where each of them is encoded alone and recalls nothing that changes
    what is stored: a text is read so many at a time."""
    count: bool = True
    """Whether recalls count for eviction."""
    min_score: float | None = None
    """A chunk with a lower score than this is not recalled, so that a memory of something else is left alone. None:
    what a `MemoryModel` was made for with this embedder; else every chunk may be recalled."""
    min_share: float | None = None
    """A chunk is not recalled whose score is below this share of the best one's, from 0 to 1, also where the best is
    not recalled because it is among the `recent` ones: one clear answer comes alone, and look-alikes come together.
    None: what a `MemoryModel` was made for, 0.8 where it was made for no memory; in a `Memory` every chunk may be
    recalled."""
    metadata: Mapping[str, Scalar] | None = None
    """What is stored beside every chunk, by key. None: nothing."""
    source: str | None = None
    """Names the text that is read: a chunk of it that is written again, after a crash, is stored once, and a chunk that
    was deleted, evicted or had expired since is stored again. None: every chunk that is read is stored."""
    spool: Spool | None = None
    """Where chunks wait while the service is away. None: a `MemoryModel` has a folder of the user's for each bank, a
    `Memory` drops and counts them."""
    strict: bool = False
    """Whether a service that is away raises, instead of a warning with which generation goes on."""
    patience: float | None = None
    """Seconds that one call to the service may take. None: 2, so that a conversation goes on; with `strict` 10."""
    retry_after: float = 2.0
    """Seconds after which a service that was away is asked again, at first; the pause doubles up to a minute."""
    payload_cache: PayloadCache | None = None
    """Payloads that were recalled and are not sent again. None: a cache of the memory's own of 256 MiB."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    @property
    def call_seconds(self) -> float:
        """Return the seconds that one call to the service may take: `patience`, or its default."""
        return self.patience or (_STRICT_PATIENCE_S if self.strict else _PATIENCE_S)


class MemoryOptions(TypedDict, total=False):
    """The fields of `MemorySettings` as keywords, with the same names and types: `MemorySettings` describes each."""

    embedder: AnyEmbedder | None
    compressor: str | Compressor
    chunk: int | None
    top_k: int | None
    recent: int | None
    order: Literal["time", "score"] | None
    cadence: int | None
    ahead: int
    query_tokens: int | None
    query: Literal["with_input", "past"]
    context: Literal["isolated", "window"] | None
    together: int
    count: bool
    min_score: float | None
    min_share: float | None
    metadata: Mapping[str, Scalar] | None
    source: str | None
    spool: Spool | None
    strict: bool
    patience: float | None
    retry_after: float
    payload_cache: PayloadCache | None


def changed(settings: MemorySettings, options: Mapping[str, Any]) -> MemorySettings:
    """Return the settings of a memory with the fields of `options` in the place of their own.

    Raises InputError for a value out of its bounds, and for a name that is no field of `MemorySettings`, with the
    nearest one that is. That holds for the further fields of `ModelSettings` too, which a memory would not heed.
    """
    check_names(MemorySettings, options)
    return replace(settings, **options)


def check_names(kind: type[MemorySettings], options: Iterable[str]) -> None:
    """Refuse names that are no fields of the settings `kind`. Raises InputError, which names the nearest field."""
    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise InputError(f"there is no setting {name!r}; the nearest is {near!r}")


def unless_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Make a check that lets None pass."""
    return lambda name, value: None if value is None else check(name, value)


def _metadata(name: str, value: Any) -> dict[str, Any]:
    try:
        return kvbank.checked_metadata(of_kind(name, value, Mapping))
    except kvbank.InvalidArgument as error:
        raise InputError(str(error)) from None


def _share(name: str, value: Any) -> float:
    if not 0 <= (share := finite(name, value)) <= 1:
        raise InputError(f"{name} is from 0 to 1, not {share:g}")
    return share


def _compressor(name: str, value: Any) -> Compressor:
    return of_kind(name, compressor_named(value) if isinstance(value, str) else value, Compressor)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "chunk": unless_none(whole),
    "top_k": unless_none(whole),
    "recent": unless_none(partial(whole, least=0)),
    "order": unless_none(partial(choice, options=("time", "score"))),
    "cadence": unless_none(whole),
    "ahead": partial(whole, least=0),
    "query_tokens": unless_none(whole),
    "embedder": lambda _, value: embedder_named("lexical" if value is None else value),
    "compressor": _compressor,
    "query": partial(choice, options=("with_input", "past")),
    "context": unless_none(partial(choice, options=("isolated", "window"))),
    "together": whole,
    "count": flag,
    "strict": flag,
    "min_score": unless_none(finite),
    "min_share": unless_none(_share),
    "metadata": unless_none(_metadata),
    "source": unless_none(partial(of_kind, kind=str)),
    "spool": unless_none(partial(of_kind, kind=Spool)),
    "patience": unless_none(partial(finite, above=0.0)),
    "retry_after": finite,
    "payload_cache": unless_none(partial(of_kind, kind=PayloadCache)),
}
