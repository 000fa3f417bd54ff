"""The options by which a bank is made or changed are grouped here, and become what the SDK takes."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

import kvbank
from kvbank._cli import parse

# The largest figure of a spec.
LARGEST = 2**31 - 1

_Percent = Annotated[
    int | None, typer.Option(min=0, max=100, help="Bound of the policy, in percent (docs/eviction.md).")
]


@dataclass(frozen=True, slots=True)
class Specs:
    """The options that say what a bank holds, which cannot be changed later."""

    embedder: Annotated[str, typer.Option(help="Digest of the embedder.")]
    dimension: Annotated[int, typer.Option(min=1, max=LARGEST, help="Dimension of the embeddings.")]
    reader: Annotated[str | None, typer.Option(help="Digest of the reading model; without it: vectors only.")] = None
    layers: Annotated[str, typer.Option(help="Memory layers, such as 1,3.")] = ""
    kv_heads: Annotated[int, typer.Option(min=0, max=LARGEST, help="K-V heads of a layer.")] = 0
    head_dim: Annotated[int, typer.Option(min=0, max=LARGEST, help="Dimension of a head.")] = 0
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Dtype of keys and values.")] = "bf16"
    hidden_size: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST, help="Dimension of the model's input embeddings; the bank then takes soft tokens too."
        ),
    ] = 0

    def kv(self) -> "kvbank.KVSpec | None":
        """Return the spec of keys and values; None for a bank of vectors only."""
        if not self.reader:
            return None
        layers = parse.layers(self.layers)
        return kvbank.KVSpec(
            self.reader, layers, self.kv_heads, self.head_dim, self.dtype, hidden_size=self.hidden_size
        )

    def embedding(self) -> "kvbank.EmbeddingSpec":
        """Return the spec of embeddings."""
        return kvbank.EmbeddingSpec(self.embedder, self.dimension)


@dataclass(frozen=True, slots=True)
class Settings:
    """The options that can be changed later; what is not given stays as it is, or is the service's default."""

    capacity: Annotated[
        str | None, typer.Option("--capacity", help="When to evict: chunks=N, tokens=N, bytes=N (10k, 2GiB), or none.")
    ] = None
    quota: Annotated[
        str | None, typer.Option("--quota", help="When to refuse: some of chunks=N,tokens=N,bytes=N, or none.")
    ] = None
    policy: Annotated[
        Literal["frequency", "lru", "recency_half", "reject"] | None, typer.Option("--policy", help="What goes first.")
    ] = None
    lower: _Percent = None
    upper: _Percent = None
    target: _Percent = None
    ttl: Annotated[
        str | None, typer.Option("--ttl", help="Life of chunks that state none: 90s, 15m, 12h, 30d, 2w, or never.")
    ] = None
    renew: Annotated[bool, typer.Option("--renew", help="Every retrieval starts the ttl anew.")] = False
    index: Annotated[
        Literal["auto", "exact", "ivf"] | None, typer.Option("--index", help="How the bank is searched.")
    ] = None
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata",
            metavar="KEY=VALUE",
            help="Once for each key: a string, a number, true or false; quotes make a string of any of them.",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """Return what was given, as keywords of the SDK. Errors: usage errors for options that do not go together."""
        figures = {name: getattr(self, name) for name in ("lower", "upper", "target")}
        stated = {name: percent for name, percent in figures.items() if percent is not None}
        if stated and self.policy is None:
            raise typer.BadParameter("--lower, --upper and --target belong to a --policy")
        if self.renew and self.ttl is None:
            raise typer.BadParameter("--renew belongs to a --ttl")
        made: dict[str, Any] = {}
        if self.capacity is not None:
            made["capacity"] = parse.capacity(self.capacity)
        if self.quota is not None:
            made["quota"] = parse.quota(self.quota)
        if self.policy is not None:
            made["policy"] = kvbank.Policy(self.policy, **stated)
        if self.ttl is not None:
            made["expiry"] = parse.expiry(self.ttl, self.renew)
        if self.index is not None:
            made["index"] = self.index
        if self.metadata:
            made["metadata"] = parse.metadata(self.metadata)
        return made
