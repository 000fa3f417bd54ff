"""The training run behind `kvbank train icae`: from settings to a trained adapter in a folder.

What can be refused is refused before anything is written: settings, the folder, the model, the adapter, every line of
the data, in this order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from model_worker.errors import InputError
from model_worker.icae.config import IcaeConfig
from model_worker.icae.data import (
    INSTRUCTION,
    PRETRAINING,
    InstructionSet,
    JsonLines,
    JsonTexts,
    PretrainingSet,
    Sample,
    SampleRules,
    TextEncoder,
    chat_delimiters,
    is_json,
    text_pieces,
)
from model_worker.icae.model import Icae
from model_worker.icae.objectives import needed
from model_worker.train.adapter_settings import SLOTS, AdapterTraining
from model_worker.train.checkpoints import start_of
from model_worker.train.icae_trainer import TrainReport, TrainSettings, train
from model_worker.train.run_log import StepShown

Load = Callable[[str, str], tuple[Any, Any]]
Bars = Callable[[str, int, int], None]
_MOST_MIN_LM = 64
_SPANS_OF_AN_INSTRUCTION = 10
# Pieces of a plain text, in contexts: long enough that windows are drawn from anywhere, short enough that a pass sees
# most of a book.
_PIECE = 4


def train_adapter(settings: AdapterTraining, out: Path, load: Load, *, resume: bool, bars: Bars) -> TrainReport:
    """Train an adapter and write the run to `out`: adapter/, checkpoint-N/, training_log.jsonl.

    load: gives model and tokenizer by the model's name and the device. resume: go on from the last checkpoint in `out`.
    bars: called with (stage, done, in all). Raises InputError for settings and data that do not fit the model, and for
    a folder that is not empty or, with `resume`, has no checkpoint.
    """
    run = _run_settings(settings, out)
    start = start_of(out, resume)
    model, tokenizer = load(settings.model, settings.device)
    icae = _adapter(settings, model, tokenizer)
    rules = _rules(settings, icae)
    data = _Data(settings, icae, tokenizer, rules, bars)
    samples = data.samples(settings.data, settings.passes)
    held_out = data.samples(settings.eval_data) if settings.eval_data else None
    shown = StepShown(partial(bars, "training"))
    return train(icae, samples, run, held_out=held_out, resume=start, callbacks=[shown])


def _run_settings(settings: AdapterTraining, out: Path) -> TrainSettings:
    rate = (5e-5 if settings.finetunes else 1e-4) if settings.lr is None else settings.lr
    same = settings.model_dump(
        include={
            *("steps", "minutes", "batch", "accumulate", "warm_up", "schedule", "clip", "bf16"),
            *("seed", "log_every", "eval_every", "save_every"),
        }
    )
    return TrainSettings(out=out, rate=rate, checkpointing=settings.gradient_checkpointing, **same)


def _adapter(settings: AdapterTraining, model: Any, tokenizer: Any) -> Icae:
    """Make a new adapter, or load one to go on with; instructions bring their delimiters into its configuration."""
    delimiters = chat_delimiters(tokenizer) if settings.finetunes and settings.chat else ((), ())
    form = settings.rate, settings.interface, settings.positions, settings.lm_row
    config = IcaeConfig(settings.slots or SLOTS, *form, *delimiters)
    if settings.slots is None:
        config = _fitted(config, model)
    if settings.adapter is None:
        lora = settings.model_dump(include={"rank", "alpha", "dropout", "seed"})
        return Icae.create(model, config, targets=_targets(settings.targets), **lora)
    icae = Icae.from_pretrained(model, settings.adapter, trainable=True)
    if settings.finetunes:
        icae.config = replace(icae.config, prefix_ids=config.prefix_ids, suffix_ids=config.suffix_ids)
    return icae


def _fitted(config: IcaeConfig, model: Any) -> IcaeConfig:
    """Return the configuration with as many slots as fit the model's positions, and one where none does.

    Making the adapter then says why it does not fit.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or config.needed()
    return replace(config, slots=max(1, min(config.slots, config.fitting(positions))))


def _targets(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("targets names no module")
    return "all-linear" if names == ["all-linear"] else names


def _rules(settings: AdapterTraining, icae: Icae) -> SampleRules:
    """Return how samples are drawn. Raises InputError for a context that the model's positions cannot restore."""
    context = settings.context or icae.config.capacity * (_SPANS_OF_AN_INSTRUCTION if settings.finetunes else 1)
    if not settings.finetunes:
        icae.config.check_context(context, icae.limit)
    shortest = min(_MOST_MIN_LM, max(context // 2, settings.leave)) if settings.min_lm is None else settings.min_lm
    return SampleRules(settings.lm_ratio, context, settings.leave, shortest)


@dataclass(frozen=True)
class _Data:
    """Samples of files, for one adapter: every line is checked, and instructions are measured, before training."""

    settings: AdapterTraining
    icae: Icae
    tokenizer: Any
    rules: SampleRules
    bars: Bars

    def samples(self, paths: Sequence[Path], passes: int = 1) -> Dataset[Sample]:
        """Return the samples of the files. Raises InputError with `file:line` for the first bad line."""
        encoder = TextEncoder(self.tokenizer, self.icae.bos)
        if self.settings.finetunes:
            return ConcatDataset([self._instructions(path, encoder) for path in paths])
        texts = [
            JsonTexts(self._lines(path, PRETRAINING), encoder)
            if is_json(path)
            else text_pieces(path, encoder, _PIECE * self.rules.context)
            for path in paths
        ]
        return PretrainingSet(texts, self.rules, self.icae.eos, seed=self.settings.seed, passes=passes)

    def _instructions(self, path: Path, encoder: TextEncoder) -> InstructionSet:
        made = InstructionSet(self._lines(path, INSTRUCTION), encoder, self.icae.eos, context=self.rules.context)
        measuring = partial(self.bars, f"measuring {path.name}")
        made.check_fits(partial(needed, self.icae), self.icae.limit, measuring)
        return made

    def _lines(self, path: Path, fields: tuple[str, ...]) -> JsonLines:
        return JsonLines(path, fields, partial(self.bars, f"checking {path.name}"))
