"""What a run of the Trainer shows and writes down: a bar, a log of JSON lines, and its end by the clock."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model_worker.train.pace import Pace
from model_worker.train.transformers_trainer import Trainer, TrainerCallback

LOG = "training_log.jsonl"


class StepShown(TrainerCallback):
    """A callback of the Trainer that tells how many updates are done, and how many there are in all."""

    def __init__(self, progress: Callable[[int, int], None]):
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress(state.global_step, state.max_steps)


class RunLog(TrainerCallback):
    """A callback of the Trainer that keeps the log of the run, and ends the run by the clock."""

    def __init__(self, out: Path, pace: Pace):
        self._log, self._pace = out / LOG, pace

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._pace.share(state.global_step, state.max_steps) >= 1:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        entry = {"step": state.global_step, **(logs or {})}
        with self._log.open("a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()}) + "\n")


def silence(trainer: Trainer) -> None:
    """Take away what the Trainer itself prints; the log and the callbacks of the caller stay."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
