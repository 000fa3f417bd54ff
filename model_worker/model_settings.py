"""The settings of a `MemoryModel`: those of its memory, and those of its window, its attachment and its bank."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, Self

import kvbank
from model_worker.arguments import choice, of_kind, whole
from model_worker.attaching import attach
from model_worker.compress import local_rule
from model_worker.dtypes import DTYPES
from model_worker.embed import AnyEmbedder, embedder
from model_worker.errors import InputError, ModelNotFound
from model_worker.remember.settings import CHUNK, TOP_K, MemoryOptions, MemorySettings, check_names, unless_none

_LEAST_WINDOW = 256
# Settings in mode per_layer of a model that was made for no memory, found on SmolLM2 (docs/presets.md).
UNTRAINED: Mapping[str, Any] = {"min_share": 0.8}


@dataclass(frozen=True, kw_only=True)
class ModelSettings(MemorySettings):
    """How a `MemoryModel` reads and writes; its memory has the same settings, as far as they are `MemorySettings`."""

    window: int | None = None
    """Tokens of the local window, at least a chunk. None: what the model was made for, else 256, or a longer chunk."""
    local: str | None = None
    """`tova:m=N`: when generating and measuring losses, each layer attends to N local tokens of whatever age, and not
    to the window. What leaves the window is remembered as ever. None: each layer attends to the window."""
    sinks: int | None = None
    """The first so many tokens of a stream stay for good: once they have left the window, they are attended to just
    before what follows them. 0 for none. None: what the model was made for, else 4; none in mode memlong."""
    recall: Literal["attend", "reread"] = "attend"
    """Whether `generate` attends to the stored K-V of what it recalls (`attend`), or feeds the tokens of the same
    chunks again before the prompt (`reread`): by the plain model, also where the model cannot be attached."""
    capacity: kvbank.Capacity | None = None
    """Bounds of a bank that is made. None: it has none."""
    policy: kvbank.Policy | None = None
    """Which chunks go first from a bank that is made. None: those that were recalled least (`frequency`)."""
    store_dtype: str | None = None
    """`fp32`, `fp16` or `bf16`: how a bank that is made stores K-V. None: as the model computes."""
    attach_options: dict[str, Any] | None = None
    """Options of `attach`, such as `mode` and `positions`. None: as the model's `kvbank` configuration entry says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))

    @classmethod
    def of(cls, settings: MemorySettings | None, options: Mapping[str, Any], made_for: Mapping[str, Any]) -> Self:
        """Make the settings of a model, without a None for chunk, window, top_k and recent.

        Options replace fields of `settings`; what neither says comes from `made_for`, the `kvbank` entry of the model's
        configuration, or from `UNTRAINED` where there is none. Raises InputError for values that make no sense, and for
        a name that is no setting, with the nearest one that is.
        """
        given = {} if settings is None else _fields_of(of_kind("settings", settings, MemorySettings))
        check_options(options)
        asked = dict(options)
        if "embed" in asked:
            asked = {"embedder": embedder(asked.pop("embed")), **asked}
        found = cls(**{**given, **asked})
        untrained = {} if (found.attach_options or {}).get("mode") == "memlong" else UNTRAINED
        made_for = made_for or untrained
        chunk = found.chunk or whole("chunk", made_for.get("chunk", CHUNK))
        asked_mode = (found.attach_options or {}).get("mode") or made_for.get("mode")
        trained = made_for if asked_mode == made_for.get("mode") else {}
        if "embed" in trained and {**given, **asked}.get("embedder") is None:
            found = replace(found, embedder=trained["embed"])
        if found.min_score is None and "min_score" in trained and _is_named(found.embedder, trained.get("embed")):
            found = replace(found, min_score=trained["min_score"])
        return replace(
            found,
            chunk=chunk,
            query_tokens=found.query_tokens or trained.get("query_tokens"),
            context=found.context or trained.get("context"),
            top_k=found.top_k or whole("top_k", made_for.get("top_k", TOP_K)),
            min_share=made_for.get("min_share") if found.min_share is None else found.min_share,
            recent=whole("recent", made_for.get("recent", 0), least=0) if found.recent is None else found.recent,
            window=found.window or whole("window", made_for.get("window", max(_LEAST_WINDOW, chunk))),
        )


class ModelOptions(MemoryOptions, total=False):
    """The fields of `ModelSettings` as keywords, with the same names and types: `ModelSettings` describes each.

    embed: another name of `embedder`, without its None.
    """

    embed: AnyEmbedder
    window: int | None
    recall: Literal["attend", "reread"]
    local: str | None
    sinks: int | None
    capacity: kvbank.Capacity | None
    policy: kvbank.Policy | None
    store_dtype: str | None
    attach_options: dict[str, Any] | None


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse a keyword that is none of `ModelOptions`. Raises InputError, which names the nearest setting."""
    check_names(ModelSettings, options.keys() - {"embed"})


def _fields_of(settings: MemorySettings) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(settings)}


def _is_named(given: Any, spec: str | None) -> bool:
    """Tell whether an embedder is the one of a spec: scores of another one have another scale. A spec whose encoder is
    not there is taken for another one."""
    digest: str = given.digest
    try:
        return spec is not None and digest == embedder(spec).digest
    except ModelNotFound:
        return False


def _local(name: str, value: Any) -> None:
    local_rule(of_kind(name, value, str))


def _attach_options(name: str, value: Any) -> None:
    if unknown := of_kind(name, value, dict).keys() - inspect.signature(attach).parameters.keys():
        raise InputError(f"attach has no option {', '.join(map(str, unknown))}")


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "window": unless_none(whole),
    "recall": partial(choice, options=("attend", "reread")),
    "local": unless_none(_local),
    "sinks": unless_none(partial(whole, least=0)),
    "store_dtype": unless_none(partial(choice, options=DTYPES)),
    "attach_options": unless_none(_attach_options),
}
