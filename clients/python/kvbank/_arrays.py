"""Tensors of torch become arrays of numpy here, and back. This file does not import torch to recognise a tensor: a
process that has one has imported torch."""

import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_BF16 = np.dtype(ml_dtypes.bfloat16)


def is_array(value: object) -> bool:
    """Tell whether `value` is an array of numpy or a tensor of torch."""
    return isinstance(value, np.ndarray) or _is_tensor(value)


def to_numpy(value: Any) -> Any:
    """Turn a tensor of torch into an array of the same bytes, bf16 into `ml_dtypes.bfloat16`; return other values as
    they are.

    The array shares the tensor's memory where that lies on the CPU.
    Errors: what torch raises for a tensor without data or in a form that numpy has not, such as a sparse one;
    TypeError for an array with masked elements, whose values mean nothing.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise TypeError("some of its elements are masked")
    if not _is_tensor(value):
        return value
    torch = sys.modules["torch"]
    plain = value.detach().cpu().resolve_conj().resolve_neg()
    if plain.dtype == torch.bfloat16:
        return plain.contiguous().view(torch.int16).numpy().view(_BF16)
    return plain.numpy()


def to_torch(array: Array) -> Any:
    """Turn an array of numpy into a tensor of torch.

    The tensor shares the array's memory; where the array is read-only, which no tensor can be, it has a copy.

    Errors: ModuleNotFoundError where torch is not installed.
    """
    import torch

    writable = array if array.flags.writeable else array.copy()
    if writable.dtype == _BF16:
        return torch.from_numpy(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(writable)


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    # A torch that is half imported has no Tensor yet, and so there is none.
    kind = getattr(torch, "Tensor", None)
    return kind is not None and isinstance(value, kind)
