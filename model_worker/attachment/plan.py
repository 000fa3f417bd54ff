"""Which layers of a model remember and which retrieve: the plan of a memory, from three sources of defaults.

What the caller asks for goes before what the model was made for (the `kvbank` entry of its configuration), and that
before what any model can do untrained.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_worker.attachment.reports import LayerReport
from model_worker.errors import InputError, UnsupportedModel

MODES = ("memlong", "per_layer")
POSITIONS = ("zero", "continual", "original")
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
    untrained). positions: `zero` (all just before the first local token), `continual` (numbered up to it) or
    `original`.
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
        positions = _one_of("positions", asked.positions or own.get("positions", _PLACES[mode]), POSITIONS)
        choose = _memlong_layers if mode == "memlong" else _per_layer_layers
        memory, retrieval = choose(asked, own, len(reports))
        plan = cls(mode, positions, tuple(sorted(memory)), tuple(sorted(retrieval)))
        plan.check_layers(reports)
        return plan

    def source(self, retrieval_layer: int) -> int:
        """Return the memory layer whose K-V `retrieval_layer` attends to."""
        return self.memory_layers[0] if self.mode == "memlong" else retrieval_layer

    def check_layers(self, reports: Sequence[LayerReport]) -> None:
        """Raise InputError for a layer that does not exist, UnsupportedModel where K-V of layers differ in shape."""
        chosen = {*self.memory_layers, *self.retrieval_layers}
        for layer in chosen:
            if not 0 <= layer < len(reports):
                raise InputError(f"layer {layer} does not exist; the model has {len(reports)}, counted from 0")
        shapes = {(reports[x].kv_heads, reports[x].head_dim) for x in chosen}
        if len(shapes) > 1:
            raise UnsupportedModel(f"memory and retrieval layers differ in K-V heads or head size: {sorted(shapes)}")


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
