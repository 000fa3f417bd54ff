"""The options of the commands on texts are grouped here: which chunks of a bank a command means, and by which embedder
the bank is searched."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kvbank
from kvbank._cli import parse

if TYPE_CHECKING:
    from kvbank import Filter

Embed = Annotated[
    str | None,
    typer.Option(
        help="Embedder: lexical, lexical:idf, lexical:d=N, or with kvbank[worker] minilm, an encoder's folder or hub "
        "id, hybrid:A+B. Default: what the bank says."
    ),
]
# A condition of --filter, such as "year>=2000" and "draft".
_CONDITION = re.compile(r"(?P<key>.+?)(?:(?P<how>!=|>=|<=|=|>|<)(?P<value>.*))?", re.DOTALL)
_BOUNDS = {">=": "at_least", "<=": "at_most", ">": "above", "<": "below"}


@dataclass(frozen=True, slots=True)
class Which:
    """The options that select chunks by what they say of themselves."""

    filter: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE, KEY!=VALUE, KEY>=N, KEY>N, KEY<=N, KEY<N, or KEY (any value); several times: all hold, "
            "values of one key are alternatives."
        ),
    ] = None
    source: Annotated[str | None, typer.Option(help="Only of the document of this name.")] = None

    def given(self) -> "Filter | None":
        """Return the filter of these options; None where no option is given. Errors: typer.BadParameter."""
        wanted = conditions(self.filter or ())
        if self.source is not None:
            wanted.metadata["source"] = self.source
        if not wanted.metadata and not wanted.exclude:
            return None
        return kvbank.Filter(metadata=wanted.metadata, exclude=wanted.exclude)


@dataclass(slots=True)
class Conditions:
    """What the conditions of a filter say by key, as `kvbank.Filter` takes it."""

    metadata: dict[str, Any] = field(default_factory=dict)
    exclude: dict[str, Any] = field(default_factory=dict)


def conditions(texts: Sequence[str]) -> Conditions:
    """Read conditions, such as "year>=2000". Errors: typer.BadParameter."""
    found, ranges = Conditions(), dict[str, dict[str, Any]]()
    for text in texts:
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise typer.BadParameter(f"{text!r} is no condition such as KEY=VALUE, KEY>=N or KEY")
        key, how = match["key"], match["how"]
        if how is None:
            found.metadata[key] = ...
            continue
        value = parse.value(match["value"])
        if how in _BOUNDS:
            if isinstance(value, str | bool):
                raise typer.BadParameter(f"{text!r} compares with what is no number")
            ranges.setdefault(key, {})[_BOUNDS[how]] = value
        else:
            (found.metadata if how == "=" else found.exclude).setdefault(key, []).append(value)
    for key, bounds in ranges.items():
        if key in found.metadata:
            raise typer.BadParameter(f"{key!r} is to have a value and to be in a range")
        found.metadata[key] = kvbank.Range(**bounds)
    return found
