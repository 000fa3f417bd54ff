"""The watch over a model: whether it still is the reader whose digest its K-V carry.

The check is cheap at every use, and complete at every write.
"""

import functools
import threading

from torch import nn

from model_worker.attachment.digest import WeightViews, reader_of, state_token, tuner_state, version_of
from model_worker.attachment.weights import is_tuner, live_tensors
from model_worker.errors import ReaderChanged

# How peft hands each row of one forward an adapter of its own, or the place from which an adapter holds.
_BY_ROW = {"adapter_names", "alora_offsets"}


class ReaderWatch:
    """A model, its reader as it was first, and fingerprints that tell without hashing that it may have changed."""

    def __init__(self, model: nn.Module, tokenizer: object | None):
        self._model, self.tokenizer = model, tokenizer
        self._noting = threading.Lock()  # a memory looks at its model in a thread of its own too
        self.reader = reader_of(model, tokenizer)
        self._note()

    def _note(self) -> None:
        """Take the fingerprints of the model as it is now."""
        self._state, self._views = state_token(self._model), WeightViews(self._model)
        self._sampled, self._content = self._views.sampled(), self._views.fingerprint()
        live = (tensor for module in self._model.modules() for tensor in live_tensors(module))
        self._tensors = [tensor for tensor in live if version_of(tensor) >= 0]  # those whose writes are counted
        self._tuners = [module for module in self._model.modules() if is_tuner(module)]
        self._counted = self._count()

    def _count(self) -> tuple[object, ...]:
        """Return how often each known tensor was written, and the state of each adapter."""
        return *(tensor._version for tensor in self._tensors), *map(tuner_state, self._tuners)

    def check_counted(self) -> None:
        """Raise ReaderChanged when torch counted a write to a tensor that was there, or an adapter was switched."""
        self._check_rows()
        if self._count() != self._counted:
            self._check_digest()

    def check_sampled(self) -> None:
        """Raise ReaderChanged as `check_counted` does, and when tensors were replaced or some of their values differ.

        Values differ without a count after a write through `.data`.
        """
        self._check_rows()
        if self._is_other():
            self._check_digest()

    def check_whole(self) -> None:
        """Raise ReaderChanged as `check_sampled` does, and when any byte of the weights differs."""
        if self._is_other() or self._views.fingerprint() != self._content:
            self._check_digest()

    def _check_rows(self) -> None:
        """Raise ReaderChanged when peft gives the rows of this forward adapters of their own, by temporary hooks."""
        hooks = (hook for tuner in self._tuners for hook in tuner._forward_pre_hooks.values())
        named = (hook.keywords for hook in hooks if isinstance(hook, functools.partial))
        if found := next((_BY_ROW & keywords.keys() for keywords in named if _BY_ROW & keywords.keys()), None):
            raise ReaderChanged(
                f"{found.pop()} gives the rows of a batch adapters of their own, and a memory holds the K-V of one "
                "reader; choose one with set_adapter, detach and attach again"
            )

    def _is_other(self) -> bool:
        """Tell whether tensors were replaced, written with a count, or differ in some of their values."""
        return state_token(self._model) != self._state or self._views.sampled() != self._sampled

    def _check_digest(self) -> None:
        """Raise ReaderChanged, with what changed, if the digest is another; what moved may be the same reader."""
        with self._noting:
            now = reader_of(self._model, self.tokenizer)
            if now.digest != self.reader.digest:
                names = dict.fromkeys([*now.parts, *self.reader.parts])
                changed = [name for name in names if now.parts.get(name) != self.reader.parts.get(name)]
                raise ReaderChanged(
                    f"the model changed after attach ({', '.join(changed)}); detach and attach again to use it with a "
                    "bank of its own"
                )
            self._note()
