"""peft is imported here, and adapters are given their weights: whole and as they were trained, or refused.

peft takes what it finds: it leaves a missing tensor untrained with a warning, and copies one that has a name of the
base into the base. So the tensors are compared with what a model takes before the first is put.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_worker.errors import InputError


@contextmanager
def using_peft(what: str) -> Iterator[Any]:
    """Give the package peft, without its warnings. what: needs it, for the message.

    Raises InputError, with how to install it, where it is missing.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{what} needs peft ({error}): pip install 'kvbank[icae]'") from None
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 under an old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield peft


@torch.no_grad()
def put(peft: Any, model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Give a peft model these weights. Raises InputError, before the first, for others than it has."""
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(wanted.keys() | tensors.keys()):
        have, take = (tuple(own[name].shape) if name in own else "nothing" for own in (tensors, wanted))
        if have != take:
            raise InputError(
                f"the adapter in {folder} does not fit this model: of {name} it has {have}, the model takes {take}"
            )
    peft.set_peft_model_state_dict(model, tensors)
