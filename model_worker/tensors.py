"""Tensors on their way between torch and the SDK's numpy arrays, without a copy where dtypes allow."""

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_numpy(tensor: Tensor) -> NDArray[np.generic]:
    """A contiguous array of the same bytes; bf16 as `ml_dtypes.bfloat16`."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()  # type: ignore[no-any-return]


def to_torch(array: NDArray[np.generic]) -> Tensor:
    """A tensor over the same bytes (copied when the array is read-only)."""
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
