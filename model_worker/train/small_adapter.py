"""Train the ICAE adapters of the small model: `python -m model_worker.train.small_adapter --books DIR --out DIR`.

Texts are those of the small model: novels (some held back) and source of the standard library. Spans are short at first
(a slot a token, then more and more tokens a slot), since a reader that was never trained to read slots has to be found
before anything can be packed. Every 100 updates the held-back text is measured: own slots, another text's, none.

The run ends by `--steps` or `--minutes`. Only a run by steps is the same bit for bit: by the clock, the rate and the
lengths of spans follow the clock. `--ship DIR` puts a finished run where the package expects it, weights in float16.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.utils.data import Dataset

from model_worker.attachment.digest import reader_of
from model_worker.attachment.loading import load_model
from model_worker.attachment.model_names import SHIPPED
from model_worker.icae import folder as files
from model_worker.icae.config import IcaeConfig
from model_worker.icae.data import Sample, continuation, restoration
from model_worker.icae.decode import scores
from model_worker.icae.model import Icae
from model_worker.icae.objectives import decoder_row
from model_worker.settings.base import Count, CountOrZero, ModelName, Seed, Settings, described
from model_worker.settings.flags import missing_option, run_program, takes
from model_worker.text_files import read_book
from model_worker.train.books import book_paths
from model_worker.train.checkpoints import last_checkpoint
from model_worker.train.icae_trainer import TrainSettings, train
from model_worker.train.optimiser import MuonAdam
from model_worker.train.pace import Pace
from model_worker.train.run_log import LOG
from model_worker.train.ship import thinned
from model_worker.train.small import tokenized_texts
from model_worker.train.transformers_trainer import TrainerCallback

SHORTEST = 4
CHUNK = 64  # of the worker: a context may be so long, however short a span is


class SmallAdapterTraining(Settings):
    """Settings of one run."""

    out: Annotated[Path, described("Folder of the run.")]
    books: Annotated[Path | None, described("Folder of novels, NAME.txt or NAME.txt.gz.")] = None
    model: ModelName = SHIPPED
    name: Annotated[str, described("What the configuration calls the base.")] = SHIPPED
    resume: Annotated[bool, described("Go on from the last checkpoint in --out.")] = False
    interface: Annotated[Literal["soft", "kv"], described("How the frozen model reads slots.")] = "soft"
    positions: Annotated[Literal["contiguous", "spread"], described("Where memory tokens stand.")] = "spread"
    slots: Annotated[Count, described("Memory tokens a span.")] = 8
    rate: Annotated[Count, described("Tokens a slot.")] = 4
    rank: Annotated[Count, described("Rank of LoRA.")] = 64
    alpha: Annotated[float, described("Alpha of LoRA, whose scale is alpha / rank.")] = 64
    dropout: Annotated[float, described("Dropout of LoRA.")] = 0.0
    lm_ratio: Annotated[float, described("Share of continuations.")] = 0.1
    start: Annotated[
        Path | None,
        described("An adapter to go on with, also one of an earlier state of the base (its form, not the options')."),
    ] = None
    chunks: Annotated[float, described("Share of contexts as long as a worker's chunk.")] = 0.2
    growing: Annotated[float, described("Share of the run in which spans grow.")] = 0.3
    steps: Annotated[Count, described("Updates.")] = 3000
    minutes: Annotated[float | None, described("Minutes at most; rate and lengths follow the clock.")] = None
    batch: Annotated[Count, described("Contexts of an update.")] = 32
    lr: Annotated[float, described("Learning rate.")] = 3e-3
    adam: Annotated[bool, described("AdamW for all, not Muon for LoRA.")] = False
    seed: Annotated[Seed, described("Seed of weights and samples.")] = 0
    threads: Annotated[Count, described("Threads of torch.")] = 1
    measure_every: Annotated[Count, described("Updates between two measurements.")] = 100
    measured: Annotated[Count, described("Held-back contexts, a quarter of them on the way.")] = 256
    save_every: Annotated[CountOrZero, described("Updates between two checkpoints; 0: none.")] = 250


@dataclass(frozen=True)
class Measured:
    """Figures on held-back text, contexts of one length. Losses in nats a token, of the text alone (no BOS, no EOS).

    accuracy: share of tokens that are right, teacher-forced, with own slots.
    """

    own: float
    other: float
    plain: float
    accuracy: float


@dataclass(frozen=True)
class SpanRules:
    """Rules by which samples are drawn.

    steps, batch: updates, and contexts of each. lm_ratio: share of continuations. growing: share of the run in which
    spans grow. chunks: share of contexts as long as a worker's chunk, behind that. seed: of all draws.
    """

    steps: int
    batch: int
    lm_ratio: float
    growing: float
    chunks: float
    seed: int


class Spans(Dataset[Sample]):
    """A set of samples, in which sample i is a window of a text drawn by i; one length a batch, longer as the run goes
    on.
    """

    def __init__(self, texts: Sequence[np.ndarray], icae: Icae, pace: Pace, rules: SpanRules):
        self._texts, self._icae, self._pace, self._rules = texts, icae, pace, rules
        weights = np.array([len(text) for text in texts], dtype=float)
        self._ends = np.cumsum(weights / weights.sum())

    def __len__(self) -> int:
        return self._rules.steps * self._rules.batch

    def __getitem__(self, index: int) -> Sample:
        rules = self._rules
        step = index // rules.batch
        length = self._length(np.random.default_rng((rules.seed, step)), self._pace.share(step, rules.steps))
        rng = np.random.default_rng((rules.seed, step, index % rules.batch))
        text = self._texts[min(int(np.searchsorted(self._ends, rng.random())), len(self._texts) - 1)]
        start = int(rng.integers(0, len(text) - 2 * length))
        ids = [int(token) for token in text[start : start + 2 * length]]
        if rng.random() < rules.lm_ratio:
            return continuation(ids[:length], ids[length:], leave=min(4, length // 2))
        return restoration(ids[:length], self._icae.eos)

    def _length(self, rng: np.random.Generator, share: float) -> int:
        """Draw the length of a batch: up to a token a slot, growing to a full span; then full ones, two spans, and any
        between.
        """
        slots, full = self._icae.config.slots, self._icae.config.capacity
        if share < self._rules.growing:
            longest = slots + round((full - slots) * share / self._rules.growing)
            return int(rng.integers(max(longest // 2, SHORTEST), longest + 1))
        kind, chunk = rng.random(), max(CHUNK, full)
        if kind < self._rules.chunks:
            return chunk
        return full if rng.random() < 0.6 else int(rng.integers(full // 2, chunk + 1))


@torch.no_grad()
def measure(icae: Icae, contexts: Sequence[Sequence[int]]) -> Measured:
    """Measure losses with own slots, with those of the next context in the list (of one length), and without any."""
    training = icae.training
    icae.eval()
    found: list[list[float]] = []
    for at in range(0, len(contexts), 32):
        part = [list(context) for context in contexts[at : at + 32]]
        slots = icae.encode(part)
        samples = [restoration(context, None) for context in part]
        batch = [_scored(icae, samples, given) for given in (slots, [*slots[1:], slots[0]], [None] * len(part))]
        found += [[own, other, plain, right] for (own, right), (other, _), (plain, _) in zip(*batch, strict=True)]
    icae.train(training)
    return Measured(*(float(value) for value in np.mean(found, axis=0)))


def _scored(icae: Icae, samples: Sequence[Sample], slots: Sequence[Any]) -> list[tuple[float, float]]:
    """Return the mean nats and the share of right tokens of each sample."""
    rows = [decoder_row(icae, sample, own) for sample, own in zip(samples, slots, strict=True)]
    logits, labels = scores(icae, rows)
    wanted = labels >= 0
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    right = (logits.argmax(-1) == labels) & wanted
    count = wanted.sum(-1)
    return list(zip((nats.sum(-1) / count).tolist(), (right.sum(-1) / count).tolist(), strict=True))


def held_back(tokenizer: Any, books: Path, length: int, count: int) -> list[list[int]]:
    """Return windows of the novels that neither the small model nor an adapter was trained on, spread evenly over each.

    Neighbours in the list are of different novels.
    """
    texts = [tokenizer.encode(read_book(path), add_special_tokens=False) for path in book_paths(books, held_back=True)]
    each = -(-count // len(texts))
    places = [[round(i * (len(text) - length) / each) for i in range(each)] for text in texts]
    rows = [text[at[i] : at[i] + length] for i in range(each) for text, at in zip(texts, places, strict=True)]
    return rows[:count]


class _Measure(TrainerCallback):
    """A callback that measures held-back text every so many updates, into the log and on the screen."""

    def __init__(self, icae: Icae, contexts: Sequence[Sequence[int]], log: Path, every: int, pace: Pace):
        self._icae, self._contexts, self._log, self._every, self._pace = icae, contexts, log, every, pace

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            found = measure(self._icae, self._contexts)
            line = _line("held_back", found, step=state.global_step, seconds=round(self._pace.seconds, 1))
            print(line, flush=True)
            with self._log.open("a") as file:
                file.write(line + "\n")


def _line(event: str, found: Measured, **more: object) -> str:
    return json.dumps({"event": event, **more, **{k: round(v, 4) for k, v in vars(found).items()}})


def run(settings: SmallAdapterTraining) -> Measured:
    """Train one adapter, and measure it on held-back text.

    Raises InputError for --resume without a checkpoint, and Failed without books.
    """
    if settings.books is None:
        raise missing_option("books", "python -m model_worker.train.small_adapter")
    resume = last_checkpoint(settings.out) if settings.resume else None
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_model(settings.model)
    texts = tokenized_texts(tokenizer, settings.books, settings.out / "texts.npz")
    config = IcaeConfig(settings.slots, settings.rate, settings.interface, settings.positions, base=settings.name)
    lora = settings.model_dump(include={"rank", "alpha", "dropout", "seed"})
    if settings.start:
        icae = _gone_on_with(base, settings.start)
        _take_over_log(settings.start.parent / LOG, settings.out / LOG)
    else:
        icae = Icae.create(base, config, targets="all-linear", **lora)
    pace = Pace(settings.minutes)
    rules = SpanRules(**settings.model_dump(include={"steps", "batch", "lm_ratio", "growing", "chunks", "seed"}))
    samples = Spans(texts, icae, pace, rules)
    matrices = [p for p in icae.encoder.parameters() if p.requires_grad]
    optimizer: Optimizer | None = None if settings.adam else MuonAdam(matrices, [icae.memory], settings.lr)
    watched = held_back(tokenizer, settings.books, icae.config.capacity, max(settings.measured // 4, 2))
    report = train(
        icae,
        samples,
        _course(settings),
        resume=resume,
        pace=pace,
        callbacks=[_Measure(icae, watched, settings.out / LOG, settings.measure_every, pace)],
        optimizer=optimizer,
    )
    found = measure(icae, held_back(tokenizer, settings.books, CHUNK, settings.measured))
    line = _line(
        "final", found, steps=report.steps, seconds=report.seconds, tokens_a_context=CHUNK, contexts=settings.measured
    )
    print(line, flush=True)
    with (settings.out / LOG).open("a") as file:
        file.write(line + "\n")
    return found


def _gone_on_with(base: Any, start: Path) -> Icae:
    """Load an adapter for more training. One of an earlier state of the base becomes one of this base."""
    source = files.find(start)
    config, rows, _ = files.read(source)
    own = reader_of(base).digest
    if config.base_digest == own:
        return Icae.from_pretrained(base, source, trainable=True)

    def adapter(staged: Path) -> None:
        for name in (files.ADAPTER_CONFIG, files.ADAPTER):
            (staged / name).write_bytes((source / name).read_bytes())

    with TemporaryDirectory() as moved:
        files.write(Path(moved), replace(config, base_digest=own), rows, adapter)
        return Icae.from_pretrained(base, moved, trainable=True)


def _course(settings: SmallAdapterTraining) -> TrainSettings:
    return TrainSettings(
        out=settings.out,
        steps=settings.steps,
        minutes=settings.minutes,
        batch=settings.batch,
        rate=settings.lr,
        warm_up=50,
        clip=1.0,
        seed=settings.seed,
        log_every=25,
        save_every=settings.save_every,
        shuffle=False,
    )


def _take_over_log(before: Path, log: Path) -> None:
    """Begin the log of a second stage with that of the first, so that one log tells the whole training."""
    if before.is_file() and not log.exists():
        log.write_text(before.read_text() + json.dumps({"event": "second stage, steps and seconds from 0"}) + "\n")


def ship(out: Path, target: Path, model: str = "kvbank-small", limit: int = 100_000) -> None:
    """Copy the adapter, in float16, and the thinned log of a finished run; leave the card, written by hand, alone."""
    source = files.find(out / "adapter")
    config, rows, _ = files.read(source)

    def adapter(staged: Path) -> None:
        (staged / files.ADAPTER_CONFIG).write_bytes((source / files.ADAPTER_CONFIG).read_bytes())
        half = {name: tensor.half() for name, tensor in load_file(source / files.ADAPTER).items()}
        save_file(half, staged / files.ADAPTER, metadata={"format": "pt"})

    with TemporaryDirectory() as trial:  # rounded weights have another digest
        files.write(Path(trial), config, rows, adapter)
        digest = Icae.from_pretrained(load_model(model)[0], trial).digest
    files.write(target, config, rows, adapter, digest=digest)
    log = thinned((out / LOG).read_text().splitlines(), limit)
    temporary = target / ".log.partial"
    temporary.write_text("\n".join(log) + "\n")
    temporary.replace(target / LOG)


@takes(SmallAdapterTraining, file=True)
def main(
    settings: SmallAdapterTraining,
    ship_to: Annotated[
        Path | None, typer.Option("--ship", help="Train nothing: put the finished run in --out into this folder.")
    ] = None,
) -> None:
    """Train an ICAE adapter of the small model, and measure it on held-back text."""
    if ship_to is None:
        run(settings)
    else:
        ship(settings.out, ship_to, settings.model)


if __name__ == "__main__":
    run_program(main, "python -m model_worker.train.small_adapter")
