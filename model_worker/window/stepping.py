"""Generation whose forwards of one token are made by another function, which may make those of several texts at once.

`generate` of transformers decides about everything else: processors of logits, draws, stopping criteria and streamers
see what they see otherwise.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from model_worker.attachment.model_parts import plain

Step = Callable[[Any, dict[str, Any]], Any]
"""Called with a model and the keywords of a forward of one token; returns what the model returns for them."""


def stepping(model: Any, step: Step) -> Any:
    """Return what is `model` in everything, but has its forwards of one token made by `step`.

    It shares all attributes with the transformers model inside `model`, and costs nothing to make. A callable that is
    handed to `generate` as `custom_generate` would not do: transformers 5.23 gives it no streamer and no stop strings.
    """
    inside = plain(model)
    inside = getattr(inside, "_orig_mod", inside)  # what torch.compile wraps is what generates
    kind: Any = type(inside)
    seen = object.__new__(_stepped(kind))
    for name, value in (("__dict__", inside.__dict__), ("stepped", inside), ("step", step)):
        object.__setattr__(seen, name, value)  # a module would take another one for a part of itself
    return seen


@cache
def _stepped(kind: Any) -> Any:
    """Return a class whose objects are models of class `kind` with steps."""

    def call(self: Any, *args: Any, **inputs: Any) -> Any:
        ids = inputs.get("input_ids")
        if args or ids is None or ids.shape[1] != 1:
            return self.stepped(*args, **inputs)
        return self.step(self.stepped, inputs)

    return type(kind.__name__, (kind,), {"__slots__": ("stepped", "step"), "__call__": call})
