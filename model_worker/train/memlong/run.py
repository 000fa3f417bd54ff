"""The training run behind `kvbank train memlong`: from settings to a model or an adapter in a folder.

What can be refused is refused before anything is written: settings, the folder, the model, every text, in this order.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_worker.attaching import attach
from model_worker.attachment.adapter import AdapterEntry
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.digest import Reader, reader_of
from model_worker.attachment.model_names import SHIPPED
from model_worker.attachment.model_parts import config_of, device_of, plain
from model_worker.embed import embedder
from model_worker.embed.spec import lasting_spec
from model_worker.errors import InputError
from model_worker.train.checkpoints import check_complete, make_run_folder, start_of
from model_worker.train.drills import CopyDrill, DrillShape, FactDrill
from model_worker.train.memlong import product
from model_worker.train.memlong.course import Course
from model_worker.train.memlong.documents import Documents
from model_worker.train.memlong.drilling import Drilling
from model_worker.train.memlong.held_out import HeldOut, verdict
from model_worker.train.memlong.layout import Layout, shares_of
from model_worker.train.memlong.learner import Learner
from model_worker.train.memlong.pool import Pool
from model_worker.train.memlong.remembering import Remembering
from model_worker.train.memlong.rows import Blocks
from model_worker.train.memlong.settings import MemlongTraining
from model_worker.train.memlong.streams import Streams
from model_worker.train.memlong.trainable import Lora, Trained, freeze_below, trained, with_lora
from model_worker.train.memlong.trainer import EveryEval, MemlongTrainer, arguments, optimiser_of
from model_worker.train.pace import Pace
from model_worker.train.run_log import LOG, RunLog, StepShown, silence
from model_worker.user_text import begin_of

Load = Callable[[str, str], tuple[Any, Any]]
Bars = Callable[[str, int, int], None]
_FILLERS = 8  # documents that drills take filler from
_NEW = re.compile(r"(?:hidden=(?P<hidden>\d{1,5})|layers=(?P<layers>\d{1,3}))")


@dataclass(frozen=True)
class MemlongReport:
    """The result of a run.

    product: the folder that `--model` or `--adapter` takes. trained: share of trained values. tokens: of texts, in this
    start and those before it. held_out: losses and gains. verdict: whether the memory is a gain; empty without texts.
    """

    product: str
    steps: int
    tokens: int
    seconds: float
    trained: float
    loss: float | None
    held_out: list[dict[str, Any]] = field(default_factory=list)
    verdict: str = ""


@dataclass(frozen=True)
class _Prepared:
    """A model that is ready to be trained. base: its reader digest without the adapter; None where it has none."""

    attachment: Attachment
    tokenizer: Any
    layout: Layout
    blocks: Blocks
    share: Trained
    base: Reader | None


def train_memlong(settings: MemlongTraining, out: Path, load: Load, *, resume: bool, bars: Bars) -> MemlongReport:
    """Train a model to use its memory, and write the run to `out`: model/ or adapter/, checkpoint-N/, the log.

    load: gives model and tokenizer by the model's name and the device. resume: go on from the last checkpoint in `out`.
    bars: called with (stage, done, in all). Raises InputError for settings and texts that do not fit the model, and for
    a folder that is not empty or, with `resume`, has no checkpoint; UnsupportedModel for a model without a memory.
    """
    start = start_of(out, resume)
    if start is not None:
        check_complete(start)
    torch.manual_seed(settings.seed)
    model, tokenizer = _model(settings, load)
    made = _prepared(settings, model, tokenizer)
    documents = Documents(
        settings.text,
        tokenizer,
        made.layout.window,
        without=settings.held_out,
        show=partial(bars, "reading texts"),
    )
    held_out = _held_out(settings, made)
    make_run_folder(out)
    try:
        return _Run(settings, out, made, documents, held_out, bars).run(start)
    finally:
        made.attachment.detach()


def _model(settings: MemlongTraining, load: Load) -> tuple[Any, Any]:
    """Return the model that is trained, and its tokenizer: one that is loaded, or a fresh one of the shipped kind."""
    if settings.new is None:
        return load(settings.model, settings.device)
    if not settings.full:
        raise InputError("an adapter of a fresh model would be of use on no other one: --new goes with --train full")
    from model_worker.train.small import make_model

    parts = [_NEW.fullmatch(part.strip()) for part in settings.new.split(",")]
    sizes = {name: int(value) for part in parts if part for name, value in part.groupdict().items() if value}
    if not all(parts) or sizes.keys() != {"hidden", "layers"} or sizes["hidden"] % 64 or not all(sizes.values()):
        raise InputError(f"new is hidden=N,layers=N with a multiple of 64 for hidden, not {settings.new!r}")
    shipped, tokenizer = load(SHIPPED, settings.device)
    memory = max(1, sizes["layers"] // 3) if settings.memory_layer is None else settings.memory_layer
    made = make_model(len(tokenizer), memory, sizes["layers"], sizes["hidden"])
    return made.to(device_of(shipped)), tokenizer


def _prepared(settings: MemlongTraining, model: Any, tokenizer: Any) -> _Prepared:
    """Choose the layers of a model, freeze what stays, add what is trained, and attach the memory."""
    layout = Layout.of(settings, config_of(model))
    depth, above = config_of(model).num_hidden_layers, layout.above if settings.freezes else 0
    if above >= depth:
        raise InputError(f"no layer is left to train above the memory layer: the model has {depth}")
    base = None
    if settings.full:
        model.float().requires_grad_(True)  # small steps are rounded away in bfloat16
        if settings.freezes:
            freeze_below(model, above)
    else:
        base = reader_of(model, tokenizer)
        names = tuple(name.strip() for name in settings.targets.split(",") if name.strip())
        if not names:
            raise InputError("targets names no module")
        model = with_lora(model, Lora(settings.rank, settings.alpha, settings.dropout, names, settings.norms), above)
    share = trained(model)
    attachment = attach(model, tokenizer, **layout.attach)
    try:
        limit = attachment.rotation_limit
        length = settings.blocks * layout.chunk
        if limit is not None and length > limit:
            raise InputError(f"a row of {length} tokens is longer than the {limit} positions of this model's rotation")
        return _Prepared(attachment, tokenizer, layout, layout.blocks(attachment), share, base)
    except InputError:
        attachment.detach()
        raise


def _held_out(settings: MemlongTraining, made: _Prepared) -> HeldOut | None:
    if not settings.held_out:
        return None
    documents = Documents(settings.held_out, made.tokenizer, made.layout.window)
    alone, sinks = made.layout.context == "isolated", made.layout.sinks_of(made.attachment)
    measured = HeldOut(_remembering(settings, made, documents, 2), settings.eval_blocks, settings.blocks, alone, sinks)
    measured.check()
    return measured


def _remembering(settings: MemlongTraining, made: _Prepared, documents: Documents, streams: int) -> Remembering:
    finds = embedder(settings.embed)
    return Remembering(
        documents,
        made.tokenizer,
        finds,
        made.blocks,
        made.layout.search,
        made.layout.query_tokens,
        Pool(streams, settings.memory, finds.dimension),
        settings.keep_memory,
    )


class _Run:
    """One start of a training."""

    def __init__(
        self,
        settings: MemlongTraining,
        out: Path,
        made: _Prepared,
        documents: Documents,
        held_out: HeldOut | None,
        bars: Bars,
    ):
        self._settings, self._out, self._made, self._held_out, self._bars = settings, out, made, held_out, bars
        attachment, layout = made.attachment, made.layout
        self._learner = Learner(
            attachment,
            made.blocks,
            gated=settings.gate,
            gradients=settings.memory_gradients,
        )
        sizes = settings.streams, settings.blocks, layout.chunk, settings.visit
        streams = Streams(documents, *sizes, settings.seed, begin_of(made.tokenizer))
        self._course = Course(
            streams,
            _remembering(settings, made, documents, settings.streams),
            shares_of(settings),
            self._learner,
            alone=layout.context == "isolated",
            sinks=layout.sinks_of(attachment),
        )
        self._drilling = self._drills(documents)
        self._pace = Pace(settings.minutes)

    def _drills(self, documents: Documents) -> Drilling:
        """Return the drills beside the texts, whose filler is of some of these. Raises InputError for short texts."""
        settings, made = self._settings, self._made
        row = made.blocks.before + 1
        shape = DrillShape(made.blocks.size, row, made.layout.search.most)
        count = max(1, round(settings.drills * settings.streams * settings.blocks / row)) if settings.drills else 0
        texts = (
            [documents.ids(index).astype(np.int64) for index in range(min(_FILLERS, len(documents)))] if count else []
        )
        long = [ids for ids in texts if len(ids) > made.blocks.window]
        if count and not long:
            raise InputError(f"no text is longer than the {made.blocks.window} tokens of a row of drills")
        drills = [kind(made.tokenizer, long, shape, settings.seed) for kind in (FactDrill, CopyDrill) if count]
        alone, sinks = made.layout.context == "isolated", made.layout.sinks_of(made.attachment)
        return Drilling(drills, self._learner, count, alone=alone, sinks=sinks)

    def run(self, start: Path | None) -> MemlongReport:
        """Train, measure, and write the product. start: a checkpoint to go on from."""
        settings = self._settings
        trainer = MemlongTrainer(
            self._learner,
            arguments(settings, self._out, device_of(self._learner).type == "cpu"),
            self._course,
            self._pace,
            settings,
            self._drilling,
            callbacks=[
                RunLog(self._out, self._pace),
                StepShown(self._show),
                EveryEval(settings.eval_every if self._held_out else 0, self._measure),
            ],
            optimizers=(optimiser_of(self._learner, settings), None),
        )
        silence(trainer)
        documents, trained = self._course.streams.documents, asdict(self._made.share)
        texts = {"documents": len(documents), "too_short": documents.short}
        self._note({"event": "begin", "trained": trained | {"share": self._made.share.share}, **texts})
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        steps = trainer.state.global_step
        measured = self._measure(steps)
        self._learner.eval()
        last: dict[str, float] = next((e for e in reversed(trainer.state.log_history) if "loss" in e), {})
        return MemlongReport(
            str(self._write()),
            steps,
            self._course.tokens,
            round(self._pace.seconds, 1),
            round(self._made.share.share, 6),
            last.get("text_loss"),
            measured,
            verdict(measured) if measured else "",
        )

    def _show(self, step: int, steps: int) -> None:
        """Show how many updates are done or, of a run that the clock may end, how many hundredths."""
        by_clock = self._settings.minutes is not None
        done = (round(100 * self._pace.share(step, steps)), 100) if by_clock else (step, steps)
        self._bars("training", *done)

    def _measure(self, step: int) -> list[dict[str, Any]]:
        """Measure the held-out texts and note what came of it."""
        if self._held_out is None:
            return []
        found = self._held_out.measure(self._learner, partial(self._bars, "held-out texts"))
        self._note({"event": "held_out", "step": step, "memories": found, "verdict": verdict(found)})
        return found

    def _note(self, event: dict[str, Any]) -> None:
        with (self._out / LOG).open("a") as file:
            file.write(json.dumps(event) + "\n")

    def _write(self) -> Path:
        """Write the product, and return its folder."""
        made, model = self._made, self._made.attachment.model
        entry = {**made.layout.entry(made.attachment), "embed": lasting_spec(self._settings.embed)}
        if gates := self._learner.gate_values():  # also those that the model came with
            entry |= product.gates_entry(gates)
        made.attachment.detach()
        if made.base is None:
            folder = self._out / product.MODEL
            product.write_model(folder, plain(model), made.tokenizer, entry)
        else:
            folder = self._out / product.ADAPTER
            product.write_adapter(folder, model, AdapterEntry.of(made.base, self._settings.model, entry))
        return folder
