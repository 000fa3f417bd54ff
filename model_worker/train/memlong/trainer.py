"""MemLong's training on `transformers.Trainer`: what is saved, resumed and logged, and what ends a run.

A checkpoint has the trained tensors alone, and beside them the optimiser's state, where the streams are, and what they
remember: a run that is resumed gives the same weights as one that was not interrupted, bit for bit on one thread.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import TrainingArguments

from model_worker.errors import InputError, WorkerError
from model_worker.train.checkpoints import readable
from model_worker.train.memlong.course import Course
from model_worker.train.memlong.drilling import Drilling
from model_worker.train.memlong.learner import Learner
from model_worker.train.memlong.settings import MemlongTraining
from model_worker.train.memlong.trainable import matrices
from model_worker.train.optimiser import MuonAdam
from model_worker.train.pace import Pace, factor_of
from model_worker.train.transformers_trainer import Trainer, TrainerCallback

TRAINED, COURSE = "trained.safetensors", "course.pt"
_ENDLESS = 10_000_000  # updates of a run that the clock ends
_STEPS = 1000
_RATES = {"adamw": 5e-5, "muon": 1.5e-3}


class Numbers(Dataset[int]):
    """The numbers of the steps of a run; what a step reads comes from the streams, in their order."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


class MemlongTrainer(Trainer):
    """The Trainer for a learner. course, drilling: where an update's rows come from."""

    def __init__(
        self,
        learner: Learner,
        args: TrainingArguments,
        course: Course,
        pace: Pace,
        settings: MemlongTraining,
        drilling: Drilling,
        **more: Any,
    ):
        self.learner, self.course, self.drilling = learner, course, drilling
        self._pace, self._settings = pace, settings
        self._sums: dict[str, list[float]] = {}
        self._before = 0, 0.0  # tokens and seconds at the last line of the log
        self._random: list[Tensor] = []  # to go on with
        numbers = Numbers(args.max_steps * args.gradient_accumulation_steps)
        super().__init__(model=learner, args=args, train_dataset=numbers, data_collator=_numbered, **more)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of the next step of the course, and remember its chunks.

        Raises WorkerError for a loss that is not finite.
        """
        if self._random:  # what the Trainer restores, its loader of data has drawn from since
            _set_random_state(self._random)
            self._random = []
        loss, kv = model(self.course.step())
        self.course.keep(kv)
        self._count("text_loss", loss)
        for step in self.drilling.steps():
            drilled, _ = model(step)
            self._count("drill_loss", drilled / step.weight)
            loss = loss + drilled
        if not torch.isfinite(loss):
            raise WorkerError(f"the loss is {loss.item()} at step {self.state.global_step}: try a lower rate")
        return (loss, {}) if return_outputs else loss

    def _count(self, name: str, loss: Tensor) -> None:
        self._sums.setdefault(name, []).append(float(loss.detach()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the Trainer does, losses of texts and drills since the last line, and tokens of text a second."""
        if "loss" in logs:
            tokens, seconds = self.course.tokens, self._pace.seconds
            since = tokens - self._before[0], seconds - self._before[1]
            means = {name: sum(values) / len(values) for name, values in self._sums.items()}
            speed = {"tokens": tokens, "tokens_a_second": round(since[0] / max(since[1], 1e-9), 1)}
            logs = {**logs, **means, **speed, "seconds": round(seconds, 1)}
            self._sums, self._before = {}, (tokens, seconds)
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Make the schedule of the rate, by updates or by the clock, whichever is further."""
        if self.lr_scheduler is None:
            share = partial(self._pace.share, steps=num_training_steps)
            factor = partial(factor_of, self._settings.schedule, self._settings.warm_up, share)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_tensors(self.learner), folder / TRAINED)
        beside = {"drilling": self.drilling.state(), "random": _random_state()}
        made_by = {"settings": self._settings.fixed, "texts": self.course.streams.documents.digest}
        torch.save({**self.course.state(), **beside, **made_by}, folder / COURSE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        with readable(str(folder)):
            tensors, state = load_file(folder / TRAINED), torch.load(folder / COURSE, weights_only=True)
        self._check_made_by(state, folder)
        load_trained(self.learner, tensors, folder)
        with readable(str(folder)):
            self.course.restore(state)
            self.drilling.restore(state["drilling"])
            self._random = state["random"]
        self._before = self.course.tokens, 0.0

    def _check_made_by(self, state: Mapping[str, Any], folder: Path) -> None:
        """Raise InputError for a checkpoint of other settings or texts: streams would go on somewhere else."""
        before, now = state.get("settings", {}), self._settings.fixed
        differing = [f"{name} (was {before[name]}, is {now[name]})" for name in before if before[name] != now.get(name)]
        if differing:
            raise InputError(f"{folder} was made with other settings: {', '.join(differing)}")
        if state.get("texts", own := self.course.streams.documents.digest) != own:
            raise InputError(f"{folder} was made with other texts, or in another order")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)


class EveryEval(TrainerCallback):
    """A callback that measures held-out texts every so many updates."""

    def __init__(self, every: int, measure: Callable[[int], object]):
        self._every, self._measure = every, measure

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._every and state.global_step % self._every == 0:
            self._measure(state.global_step)


def _random_state() -> list[Tensor]:
    """Return the states of torch's random numbers, of the CPU and of all GPUs."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _set_random_state(states: list[Tensor]) -> None:
    """Go on with the random numbers of `_random_state`."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


def _numbered(numbers: list[int]) -> dict[str, Any]:
    return {"number": torch.tensor(numbers)}


def trained_tensors(learner: Learner) -> dict[str, Tensor]:
    """Return what is trained, by name, as tensors of their own."""
    own = {name: p.detach().cpu().contiguous() for name, p in learner.named_parameters() if p.requires_grad}
    return {name: tensor.clone() for name, tensor in own.items()}


@torch.no_grad()
def load_trained(learner: Learner, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put trained tensors into a learner. Raises InputError for those of another one."""
    own = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        raise InputError(f"{folder} is a checkpoint of another training: what is trained differs")
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def optimiser_of(learner: Learner, settings: MemlongTraining) -> Optimizer:
    """Make the optimiser of a run: AdamW, or Muon for matrices and Adam for the rest at half its rate."""
    rate = settings.lr or _RATES["muon" if settings.muon else "adamw"]
    gates = list(learner.gates.parameters())
    if not settings.muon:
        own = [p for p in learner.parameters() if p.requires_grad]
        return torch.optim.AdamW(own, lr=rate, weight_decay=settings.weight_decay)
    both = list(matrices(learner.model))
    others = [p for p, muon in both if not muon] + gates
    return MuonAdam([p for p, muon in both if muon], others, rate, rate / 2, (0.9, 0.98), 0.01)


def arguments(settings: MemlongTraining, out: Path, on_cpu: bool) -> TrainingArguments:
    """Return the Trainer's arguments."""
    steps = settings.steps or (_STEPS if settings.minutes is None else _ENDLESS)
    made = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr or _RATES["muon" if settings.muon else "adamw"],
        max_grad_norm=settings.clip,
        bf16=settings.bf16,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        seed=settings.seed % 2**32,
        train_sampling_strategy="sequential",
        ignore_data_skip=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=on_cpu,
        disable_tqdm=True,
        report_to=[],
    )
    if made.n_gpu > 1:  # one device a process
        made._n_gpu = 1
    return made
