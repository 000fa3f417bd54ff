"""Which layers of a model remember and which retrieve: the plan of a memory, from three sources of defaults.

What the caller asks for goes before what the model was made for (the `kvbank` entry of its configuration), and that
before what any model can do untrained.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_worker.attachment.reports import LayerReport
from model_worker.errors import InputError, UnsupportedModel

MODES = ("memlong", "per_layer")
POSITIONS = ("zero", "near", "near:N", "continual", "original")
NEAR = 32  # tokens between memory and the tokens being processed, where nothing else is asked for
_PLACES = {"memlong": "zero", "per_layer": "continual"}


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a caller of `attach` asks for; None leaves a choice to the model's configuration."""

    mode: str | None = None
    positions: str | None = None
    memory_layers: Sequence[int] | None = None
    retrieval_layers: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Which layers remember, which retrieve, and where retrieved keys are put.

    mode: `memlong` (the K-V of one memory layer serve all retrieval layers) or `per_layer` (each its own; works
    untrained). positions: `zero` (all just before the first local token), `near:N` (all N tokens before the first token
    of the running forward, but not before the window's beginning), `continual` (numbered up to the first local token)
    or `original`.
    """

    mode: str
    positions: str
    memory_layers: tuple[int, ...]
    retrieval_layers: tuple[int, ...]

    @classmethod
    def resolve(cls, asked: PlanOptions, made_for: Mapping[str, Any], reports: Sequence[LayerReport]) -> "MemoryPlan":
        """Return the plan that the caller's options and the model's own make of its layers, all of them usable.

        made_for: the `kvbank` entry of the model's configuration; its choices count in its own mode only. Raises
        InputError for options that make no sense, UnsupportedModel for layers whose K-V do not fit each other.
        """
        mode = _one_of("mode", asked.mode or made_for.get("mode", "per_layer"), MODES)
        own = made_for if made_for.get("mode") == mode else {}
        positions = _positions(asked.positions or own.get("positions", _PLACES[mode]))
        choose = _memlong_layers if mode == "memlong" else _per_layer_layers
        memory, retrieval = choose(asked, own, len(reports))
        plan = cls(mode, positions, tuple(sorted(memory)), tuple(sorted(retrieval)))
        plan.check_layers(reports)
        return plan

    def source(self, retrieval_layer: int) -> int:
        """Return the memory layer whose K-V `retrieval_layer` attends to."""
        return self.memory_layers[0] if self.mode == "memlong" else retrieval_layer

    @property
    def recalls_below_memory(self) -> bool:
        """Tell whether a layer that attends to memory stands below one that stores, whose K-V follow from it then."""
        return min(self.retrieval_layers) < max(self.memory_layers)

    def check_layers(self, reports: Sequence[LayerReport]) -> None:
        """Raise InputError for a layer that does not exist, UnsupportedModel where K-V of layers differ in shape."""
        chosen = {*self.memory_layers, *self.retrieval_layers}
        for layer in chosen:
            if not 0 <= layer < len(reports):
                raise InputError(f"layer {layer} does not exist; the model has {len(reports)}, counted from 0")
        shapes = {(reports[x].kv_heads, reports[x].head_dim) for x in chosen}
        if len(shapes) > 1:
            raise UnsupportedModel(f"memory and retrieval layers differ in K-V heads or head size: {sorted(shapes)}")


def near_distance(positions: str) -> int | None:
    """Return the N of the positions `near:N`; None for other positions."""
    return int(positions.partition(":")[2]) if positions.startswith("near:") else None


def check_usable(name: str, reports: Sequence[LayerReport]) -> None:
    """Raise UnsupportedModel, for the model of class `name`, where a layer cannot hold a memory.

    A layer that would not retrieve counts too: its window has to move with those of the others.
    """
    for report in reports:
        if report.kind not in ("rope", "nope"):
            raise UnsupportedModel(f"{name}: layer {report.layer} is {report.kind}: {report.reason}")


def _one_of(name: str, value: Any, options: Collection[str]) -> str:
    """Return `value`, which is one of `options`. Raises InputError."""
    if value not in options:
        raise InputError(f"{name} {value!r} is not one of {options}")
    return str(value)


def _positions(value: Any) -> str:
    """Return the positions of a plan, `near` with its distance in tokens. Raises InputError."""
    if value == "near":
        return f"near:{NEAR}"
    if isinstance(value, str) and re.fullmatch(r"near:[0-9]{1,6}", value):
        return value
    return _one_of("positions", value, POSITIONS)


_Chosen = tuple[Sequence[int], Sequence[int]]


def _memlong_layers(asked: PlanOptions, own: Mapping[str, Any], count: int) -> _Chosen:
    """Return memory and retrieval layers of the mode `memlong`: by default the middle one, and all from it upwards."""
    memory = asked.memory_layers or own.get("memory_layers") or [count // 2]
    retrieval = asked.retrieval_layers or own.get("retrieval_layers") or range(memory[0], count)
    if len(memory) != 1:
        raise InputError(f"mode memlong has one memory layer, not {len(memory)}")
    return memory, retrieval


def _per_layer_layers(asked: PlanOptions, own: Mapping[str, Any], count: int) -> _Chosen:
    """Return memory and retrieval layers of the mode `per_layer`, which are the same: by default all layers."""
    retrieval = asked.retrieval_layers or asked.memory_layers or own.get("retrieval_layers") or range(count)
    memory = asked.memory_layers or retrieval
    if list(memory) != list(retrieval):
        raise InputError("in mode per_layer memory layers and retrieval layers are the same")
    return memory, retrieval
