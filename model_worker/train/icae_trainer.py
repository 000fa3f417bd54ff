"""Training of an adapter on `transformers.Trainer`: what is saved, resumed, logged, evaluated, and how the rate falls.

Only LoRA and the memory rows are trained and saved; a checkpoint is an adapter folder with the optimiser's state beside
it. The loss of a step is a mean over all scored tokens of the step, and the loss of an evaluation over all of its set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from model_worker.attachment.with_peft import put
from model_worker.errors import InputError, WorkerError
from model_worker.icae import folder as files
from model_worker.icae import lora
from model_worker.icae.data import Sample
from model_worker.icae.model import Icae
from model_worker.icae.objectives import Objectives, Tally, collate
from model_worker.train.checkpoints import check_complete, make_run_folder, readable
from model_worker.train.pace import Pace, factor_of
from model_worker.train.run_log import RunLog, silence
from model_worker.train.transformers_trainer import Trainer, TrainerCallback

ADAPTER = "adapter"  # folder of the finished adapter within a run's
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run.

    out: the folder of the run. steps: updates; None for one pass over the data. minutes: a limit by the clock, of this
    start; the rate falls to its end by whichever of the two comes first. batch: contexts at a time, `accumulate` times
    before each update. rate: of AdamW; warm_up: updates over which the rate rises; schedule: `cosine` to 3 % of the
    rate, or `constant`. clip: norm of the gradient at most. bf16: compute in bfloat16; weights that are trained stay
    float32. checkpointing: recompute layers in the backward pass. log_every, eval_every, save_every: updates; 0 for
    never. keep: checkpoints that stay.
    shuffle: draw the samples in random order.
    """

    out: Path
    steps: int | None = None
    minutes: float | None = None
    batch: int = 8
    accumulate: int = 1
    rate: float = 1e-4
    warm_up: int = 300
    schedule: str = "cosine"
    clip: float = 2.0
    weight_decay: float = 0.0
    bf16: bool = False
    checkpointing: bool = False
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule {self.schedule!r} is not one of {SCHEDULES}")
        for name in ("batch", "accumulate", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is at least 1, not {getattr(self, name)}")
        if (self.steps is not None and self.steps < 1) or (self.minutes is not None and not self.minutes > 0):
            raise InputError("steps and minutes are more than nothing")
        if not 0 < self.rate < math.inf:
            raise InputError(f"the learning rate is a number above 0, not {self.rate}")
        if not self.clip >= 0:
            raise InputError(f"clip is a norm, at least 0, not {self.clip}")


@dataclass(frozen=True)
class TrainReport:
    """The result of a run. losses: nats a token, by objective, at the end; evaluation: the same on held-out data."""

    adapter: str
    digest: str
    steps: int
    seconds: float
    losses: dict[str, float]
    evaluation: dict[str, float]


class IcaeTrainer(Trainer):
    """The Trainer for `Objectives`.

    Raises InputError for fp16, in which ICAE does not train, and for an adapter of which nothing is trainable.
    """

    def __init__(self, icae: Icae, args: TrainingArguments, *, pace: Pace, settings: TrainSettings, **more: Any):
        if args.fp16 or icae.dtype == torch.float16:
            raise InputError("ICAE does not train in fp16 (losses overflow, as its authors say): use bf16 or float32")
        if not any(p.requires_grad for p in icae.parameters()):
            raise InputError("nothing of this adapter is trainable: load it with trainable=True")
        self.icae, self._pace, self._settings = icae, pace, settings
        self.unlogged, self._evaluated = Tally(), Tally()
        super().__init__(model=Objectives(icae), args=args, data_collator=collate, **more)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss as the Trainer does, and count the nats of each sample by objective.

        Raises WorkerError for a loss that is not finite.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not torch.isfinite(loss):
            raise WorkerError(
                f"the loss is {loss.item()} at step {self.state.global_step}: try a lower rate or more warm-up"
            )
        tally = self.unlogged if model.training else self._evaluated
        tally.add(inputs["samples"], outputs["nats"], outputs["tokens"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the Trainer does, and the losses of each objective since the last log, over their own tokens."""
        if "loss" in logs:
            logs = {**logs, **self.unlogged.means(), "seconds": round(self._pace.seconds, 1)}
            self.unlogged = Tally()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate with means over tokens, where the Trainer takes means over batches, whatever their lengths."""
        self._evaluated = Tally()
        output = super().evaluation_loop(*args, **{**kwargs, "prediction_loss_only": True})
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._evaluated.means().items()})
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Make the schedule of the rate: up while warming up, then down by updates or by the clock.

        Because of the clock the rate is no function of the step alone.
        """
        if self.lr_scheduler is None:
            settings, pace = self._settings, self._pace

            def factor(step: int) -> float:
                share = partial(pace.share, steps=num_training_steps)
                return factor_of(settings.schedule, settings.warm_up, share, step)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter alone: neither copy of the base is ever written."""
        self.icae.save_pretrained(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_into(self.icae, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)


def load_into(icae: Icae, folder: Path) -> None:
    """Put the weights of an adapter folder into an adapter of the same form. Raises InputError for another form."""
    found = files.find(folder)
    config, rows, _ = files.read(found)
    with files.using_peft() as peft, torch.no_grad():
        settings, tensors = lora.read(peft, found)
        if config != icae.config or not all(lora.alike(settings, own) for own in icae.encoder.peft_config.values()):
            raise InputError(
                f"{folder} is an adapter of another form than the one in training: its icae_config.json or "
                f"adapter_config.json differs"
            )
        put(peft, icae.encoder, tensors, folder)
        icae.memory.copy_(rows)


def train(
    icae: Icae,
    samples: Dataset[Sample],
    settings: TrainSettings,
    *,
    held_out: Dataset[Sample] | None = None,
    resume: Path | None = None,
    pace: Pace | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer: Optimizer | None = None,
) -> TrainReport:
    """Train `icae` in place and write it to `settings.out / "adapter"`.

    resume: a checkpoint of the same settings, from which everything goes on: weights, optimiser, rate, samples, random
    numbers (the clock starts anew). pace: the clock of the run, where the samples ask it too. optimizer: instead of
    AdamW. Raises InputError for fp16, for a checkpoint that does not fit and where `settings.out` cannot be a folder,
    and WorkerError where the loss is no number any more.
    """
    make_run_folder(settings.out)
    pace = pace or Pace(settings.minutes)
    if resume is not None:
        check_complete(resume)
    trainer = IcaeTrainer(
        icae,
        _arguments(icae, settings, held_out is not None),
        pace=pace,
        settings=settings,
        train_dataset=samples,
        eval_dataset=held_out,
        callbacks=[RunLog(settings.out, pace), *callbacks],
        optimizers=(optimizer, None),
    )
    silence(trainer)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    icae.save_pretrained(settings.out / ADAPTER)
    evaluation = trainer.evaluate() if held_out is not None else {}
    icae.eval()
    return _report(trainer, evaluation, pace)


def _report(trainer: IcaeTrainer, evaluation: dict[str, float], pace: Pace) -> TrainReport:
    """Return the result of a run; its losses are those since the last line of the log, or of that line."""
    last: dict[str, float] = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    losses = trainer.unlogged.means() or last
    return TrainReport(
        str(Path(trainer.args.output_dir) / ADAPTER),
        trainer.icae.digest,
        trainer.state.global_step,
        round(pace.seconds, 1),
        {name: value for name, value in losses.items() if name.endswith("loss")},
        {name.removeprefix("eval_"): value for name, value in evaluation.items() if name.endswith("loss")},
    )


def _arguments(icae: Icae, settings: TrainSettings, evaluates: bool) -> TrainingArguments:
    evaluates = evaluates and settings.eval_every > 0
    arguments = TrainingArguments(
        output_dir=str(settings.out),
        max_steps=settings.steps or -1,
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        bf16=settings.bf16,
        activation_checkpointing=settings.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.checkpointing else None,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_every if evaluates else None,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=settings.keep,
        seed=settings.seed,
        train_sampling_strategy="random" if settings.shuffle else "sequential",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=icae.device.type == "cpu",
        disable_tqdm=True,
        report_to=[],
    )
    if arguments.n_gpu > 1:  # one device a process; several through torchrun, which the Trainer knows
        arguments._n_gpu = 1
    return arguments
