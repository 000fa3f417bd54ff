"""The form of an ICAE adapter, which is what there is of it beside its tensors: `icae_config.json`.

LoRA's rank, alpha, dropout and targets live in peft's `adapter_config.json`; BOS and EOS are the model's own and are
stored nowhere.
"""

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from model_worker.errors import InputError

FORMAT = 1
INTERFACES = ("soft", "kv")
POSITIONS = ("contiguous", "spread")
MEMORY_INITS = ("embedding_std", "normal")


@dataclass(frozen=True)
class IcaeConfig:
    """The form of one adapter.

    slots: memory tokens a span (k). rate: a span holds at most slots * rate tokens. interface: `soft` (the paper: slots
    after the final norm, read as embeddings) or `kv` (500xCompressor, arXiv 2408.03094: the encoder's own K-V of the
    memory tokens). positions: `contiguous` behind the context, or `spread` over it (EPL, arXiv 2409.14364).
    lm_row: a continuation begins with the LM row. prefix_ids, suffix_ids: around slots and prompt when a question is
    answered, BOS included where it is wanted. base: what the base was called, for people. base_digest: the reader
    digest of the frozen base, without a tokenizer; empty for an import without its base at hand. memory_init: how the
    rows began. Raises InputError for values that make no sense.
    """

    slots: int
    rate: int = 4
    interface: str = "soft"
    positions: str = "contiguous"
    lm_row: bool = False
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    base: str = ""
    base_digest: str = ""
    memory_init: str = "embedding_std"
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise InputError(f"this ICAE adapter has format {self.format!r}; this kvbank reads format {FORMAT}")
        if self.slots < 1 or self.rate < 1:
            raise InputError(f"slots and rate are at least 1, not {self.slots} and {self.rate}")
        for name, allowed in (("interface", INTERFACES), ("positions", POSITIONS), ("memory_init", MEMORY_INITS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} {getattr(self, name)!r} is not one of {allowed}")

    @property
    def capacity(self) -> int:
        """Return how many tokens one span holds at most."""
        return self.slots * self.rate

    def needed(self, slots: int | None = None) -> int:
        """Return the positions that a full span takes, of `slots` slots instead of the adapter's own if given.

        The encoder reads span and memory rows, the decoder slots, a row and the span again. Spread K-V stand on the
        source's positions, and the decoder goes on behind it.
        """
        slots = slots or self.slots
        spreads = self.interface == "kv" and self.positions == "spread"
        return slots * self.rate + (slots * self.rate if spreads else slots) + 1

    def before(self, tokens: int) -> int:
        """Return the positions before what the decoder reads behind the slots of a context of so many tokens."""
        spreads = self.interface == "kv" and self.positions == "spread"
        return tokens if spreads else self.slots * -(-tokens // self.capacity)

    def restoring(self, tokens: int) -> int:
        """Return the positions that the restoration of so many tokens takes: their slots, a row, the tokens."""
        return self.before(tokens) + 1 + tokens

    def longest(self, positions: int) -> int:
        """Return the most tokens of a context that can be restored within so many positions; 0 for none."""
        return bisect_right(range(positions + 1), positions, key=self.restoring) - 1

    def fitting(self, positions: int) -> int:
        """Return the most slots of this form that fit a model of so many positions; 0 for none."""
        return max(0, (positions - 1) // (self.needed(1) - 1))

    def check_fits(self, positions: int | None) -> None:
        """Raise InputError where a full span runs beyond the model's positions. None: the model states no limit."""
        if positions is None or self.needed() <= positions:
            return
        most = self.fitting(positions)
        hint = f"at rate {self.rate} at most {most} slots fit" if most else f"rate {self.rate} is too much for any slot"
        raise InputError(
            f"{self.slots} slots of {self.rate} tokens need {self.needed()} positions, this model has {positions}: "
            f"{hint}"
        )

    def too_long(self, tokens: int, positions: int | None) -> str:
        """Say why a context cannot be restored within the model's positions; return an empty text where it can.

        positions: None where the model states no limit.
        """
        if positions is None or self.restoring(tokens) <= positions:
            return ""
        return (
            f"a context of {tokens} tokens needs {self.restoring(tokens)} positions to be restored from its slots, "
            f"this model has {positions}: at most {self.longest(positions)} tokens fit"
        )

    def check_context(self, tokens: int, positions: int | None) -> None:
        """Raise InputError where a context is too long to be restored (see `too_long`)."""
        if why := self.too_long(tokens, positions):
            raise InputError(why)

    def check_ids(self, vocabulary: int) -> None:
        """Raise InputError where ids around slots and prompt are none of the model's."""
        if wrong := [token for token in (*self.prefix_ids, *self.suffix_ids) if not 0 <= token < vocabulary]:
            raise InputError(f"prefix_ids and suffix_ids are ids of the model, which has {vocabulary}, not {wrong[0]}")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def to_json(self) -> str:
        """Return the text of `icae_config.json`, without the adapter's digest."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> "IcaeConfig":
        """Read a configuration from what `to_dict` returned.

        Raises InputError unless each entry is there, of its type, and no other.
        """
        if said.get("format") != FORMAT:
            raise InputError(f"this ICAE adapter has format {said.get('format')!r}; this kvbank reads format {FORMAT}")
        wanted = get_type_hints(cls)
        if missing := sorted(set(wanted) - set(said)):
            raise InputError(f"icae_config.json lacks {', '.join(missing)}")
        if unknown := sorted(set(said) - set(wanted)):
            raise InputError(f"icae_config.json has entries that this kvbank does not know: {', '.join(unknown)}")
        for name, value in said.items():
            if not (_token_ids(value) if wanted[name] == tuple[int, ...] else type(value) is wanted[name]):
                raise InputError(f"icae_config.json cannot be read: {name} is {value!r}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in said.items()}
        return cls(**values)


def _token_ids(value: Any) -> bool:
    """Tell whether `value` is a list of whole numbers."""
    return isinstance(value, list) and all(type(token) is int for token in value)
