"""A guard against models whose own code for generation puts the cache aside, and the memory with it.

Phi-3 does so when its rotation changes: without a word the text would go on without a memory.
"""

import functools
import types
from typing import Any

from model_worker.attachment.view import ForwardState
from model_worker.errors import InputError

_PREPARE = "prepare_inputs_for_generation"


class CacheGuard:
    """A check around a model's `prepare_inputs_for_generation`, until `remove`.

    The check raises InputError where that method was given a cache with a memory and returns another one.
    """

    def __init__(self, model: Any):
        self._model = model
        self._patch = vars(model).get(_PREPARE)  # of other code, which has put it on this one model
        own = type(model).prepare_inputs_for_generation if self._patch is None else self._patch

        @functools.wraps(own)
        def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
            prepared = own(*args, **kwargs) if own is self._patch else own(model, *args, **kwargs)
            cache = kwargs.get("past_key_values")
            if isinstance(cache, ForwardState) and prepared.get("past_key_values") is not cache:
                raise InputError(
                    f"{type(model).__name__} puts its cache aside at this length, and the memory would be lost; end "
                    "the generation before, or start a new cache"
                )
            return prepared

        # A method, so that a copy of the model gets one of its own.
        model.prepare_inputs_for_generation = types.MethodType(prepare, model)

    def remove(self) -> None:
        """Give the model its own method back."""
        vars(self._model).pop(_PREPARE, None)
        if self._patch is not None:
            vars(self._model)[_PREPARE] = self._patch
