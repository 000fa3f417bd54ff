"""A view is handed to one forward of an attached model here, without a cache: the forwards that training makes."""

from typing import Any

from torch import Tensor

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.view import ForwardState, ForwardView

KeyValue = tuple[Tensor, Tensor]  # keys before RoPE and values, [..., Hkv, T, D] each


class OneForward(ForwardState):
    """The state of a forward that keeps nothing: tokens stand at `positions` `[B or 1, T]`, and layers see `view`."""

    def __init__(self, attachment: Attachment, view: ForwardView, positions: Tensor):
        self.attachment = attachment
        self._view, self._positions = view, positions

    def before_forward(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        own = {"position_ids": self._positions, "past_key_values": None, "use_cache": False, "kvbank": self._view}
        return {**kwargs, **own}
