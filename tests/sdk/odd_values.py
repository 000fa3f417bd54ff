"""Odd values for every argument of the SDK are made here: most of them are mistakes, some are meant."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import ml_dtypes
import numpy as np
import torch

import kvbank


class Pathless:
    """An object that says that it is a path, and has none."""

    def __fspath__(self) -> int:
        return 3


class Later:
    """An object that has no items before it is awaited, like a future of asyncio."""

    def __iter__(self) -> Iterator[object]:
        raise RuntimeError("await wasn't used with future")

    __await__ = __iter__


def released() -> memoryview:
    """Return a view whose bytes were released."""
    view = memoryview(b"abcd")
    view.release()
    return view


def nested() -> torch.Tensor:
    """Return a tensor of torch that has no shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


# By label; made anew for each call, since some can be gone through once.
ODD: Mapping[str, Callable[[], Any]] = {
    "None": lambda: None,
    "...": lambda: ...,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "-1": lambda: -1,
    "0": lambda: 0,
    "0.5": lambda: 0.5,
    "-0.0": lambda: -0.0,
    "2^31": lambda: 2**31,
    "2^63": lambda: 2**63,
    "10^400": lambda: 10**400,
    "-10^5000": lambda: -(10**5000),
    "1e300": lambda: 1e300,
    "True": lambda: True,
    "Decimal": lambda: Decimal("NaN"),
    "complex": lambda: 1j,
    "np.complex": lambda: np.complex128(5),
    "text": lambda: "word",
    "empty text": lambda: "",
    "surrogate": lambda: "a\ud800b",
    "NUL": lambda: "a\0b",
    "long text": lambda: "x" * 100_000,
    "bytes": lambda: b"\xff\0",
    "bytearray": lambda: bytearray(3),
    "memoryview": lambda: memoryview(b"abcd"),
    "released": released,
    "path": Pathless,
    "future": Later,
    "list": list,
    "tuple of None": lambda: (None,),
    "list of texts": lambda: ["a", "\ud800"],
    "list of bytes": lambda: [b"a"],
    "list of nan": lambda: [float("nan")],
    "list of bools": lambda: [True, False],
    "ragged": lambda: [[1.0], [2.0, 3.0]],
    "deep": lambda: [[[[1]]]],
    "range": lambda: range(3),
    "generator": lambda: (i for i in range(3)),
    "set": lambda: {1},
    "dict": dict,
    "dict of numbers": lambda: {"a": 1, 2: "b"},
    "dict of arrays": lambda: {"a": np.array([1, 2])},
    "dict of None": lambda: {None: None},
    "dict of surrogates": lambda: {"\ud800": "\udfff"},
    "dict of huge": lambda: {"a": 2**70},
    "dict of lists": lambda: {"a": [], "b": [None]},
    "object": object,
    "type": lambda: int,
    "function": lambda: print,
    "datetime": lambda: datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=23))),
    "datetime without a zone": lambda: datetime(9999, 12, 31),
    "date": lambda: date(2024, 1, 1),
    "timedelta": lambda: timedelta.max,
    "no timedelta": lambda: timedelta(0),
    "np.int64": lambda: np.int64(3),
    "np.float32": lambda: np.float32("nan"),
    "np.bool": lambda: np.bool_(True),
    "np.str": lambda: np.str_("word"),
    "np.datetime64": lambda: np.datetime64("2024-01-01"),
    "array of 0": lambda: np.array([0]),
    "array of none": lambda: np.array([]),
    "array of no dimension": lambda: np.array(3),
    "array of two dimensions": lambda: np.ones((2, 3)),
    "array of objects": lambda: np.array([None, "a"], object),
    "masked array": lambda: np.ma.array([1.0, 2.0], mask=[True, False]),
    "masked": lambda: np.ma.masked,
    "array of times": lambda: np.array([1], "M8[ns]"),
    "array of texts": lambda: np.array(["a"]),
    "array of bools": lambda: np.array([True, False]),
    "array of bf16": lambda: np.ones(3, ml_dtypes.bfloat16),
    "tensor": lambda: torch.tensor([0]),
    "tensor of one": lambda: torch.tensor(1.5, requires_grad=True),
    "tensor of bf16": lambda: torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True),
    "tensor of bools": lambda: torch.tensor([True, False]),
    "tensor without data": lambda: torch.empty(3, device="meta"),
    "number without data": lambda: torch.empty((), device="meta"),
    "number of bf16": lambda: torch.tensor(0.5, dtype=torch.bfloat16),
    "dict of numbers without data": lambda: {"a": torch.empty((), device="meta")},
    "sparse tensor": lambda: torch.eye(3).to_sparse(),
    "nested tensor": nested,
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "model": lambda: kvbank.Hit(1, 2.0),
    "chunks": lambda: [None],
    "time": lambda: datetime.now(UTC),
}
