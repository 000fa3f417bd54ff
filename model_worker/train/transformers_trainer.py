"""The classes of transformers that training derives from, with the types of what is used of them.

transformers has no types that mypy can follow, and its strict rules refuse to derive from a class of unknown type.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import TrainerState, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput

    class TrainerCallback:
        """What the Trainer calls while it trains; every method may be left out."""

    class Trainer:
        """The loop over batches: it accumulates, evaluates, saves and resumes."""

        args: TrainingArguments
        state: TrainerState
        optimizer: Optimizer
        lr_scheduler: LambdaLR | None
        callback_handler: Any
        _created_lr_scheduler: bool

        def __init__(self, model: nn.Module, args: TrainingArguments, **more: Any) -> None: ...
        def train(self, resume_from_checkpoint: str | None = None) -> Any: ...
        def evaluate(self) -> dict[str, float]: ...
        def remove_callback(self, callback: TrainerCallback) -> None: ...
        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool,
            num_items_in_batch: Tensor | int | None,
        ) -> Any: ...
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput: ...
        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None: ...
        def _load_rng_state(self, checkpoint: str | None) -> None: ...

else:
    from transformers import Trainer, TrainerCallback

__all__ = ["Trainer", "TrainerCallback"]
