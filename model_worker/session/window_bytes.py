"""The local window of a session as bytes, which the service keeps from one worker to the next.

The bytes are a safetensors file. The service verifies them; this file owns the rule that bytes which are no window are
no error, but count as none, since the window can be made again from the turns.
"""

import safetensors
from safetensors.torch import load, save
from torch import Tensor


def window_bytes(state: dict[str, Tensor]) -> bytes:
    """Return the tensors of a window as bytes, which share nothing with the tensors."""
    # Copies, because safetensors refuses tensors that share memory.
    data: bytes = save({name: tensor.detach().cpu().clone() for name, tensor in state.items()})
    return data


def window_state(data: bytes) -> dict[str, Tensor] | None:
    """Return the tensors of a window by name; None for bytes that are none."""
    try:
        return dict(load(data)) or None
    except safetensors.SafetensorError:
        return None
