"""Train the small model that copies from its memory: `python -m model_worker.train.small --books DIR --out DIR`.

The training has stages. Each ends at its number of steps or minutes, `copy` also when the whole alphabet is learnt:
  copy    spans of random tokens repeated, over more and more symbols
  mixed   copying, facts asked for, and novels, all with memory; every weight is trained, through the memory too
  memory  the same, with the layers below the memory layer, and the embedding, frozen (MemLong's way)
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model_worker.settings.base import Count, CountOrZero, Seed, Settings, described
from model_worker.settings.flags import run_program, takes
from model_worker.text_files import read_book
from model_worker.train.books import book_paths
from model_worker.train.memory_stage import MemoryLayout, encode_chunks, hidden_states
from model_worker.train.optimiser import make_optimisers
from model_worker.train.tasks import CHUNK, SPECIALS, Batch, Tasks
from model_worker.train.tokenizer import stdlib_text, train_tokenizer

STAGES = ("copy", "mixed", "memory")
WARM_UP = 50
PART = 400_000  # characters of source code that count as one text
Minutes = Annotated[float, described("Minutes of the stage, for a machine that is shared.")]
DECAY = 0.4  # share of a stage, at its end, over which the learning rate falls to a twentieth


class SmallTraining(Settings):
    """Settings of one start of the training; steps and minutes are those of a stage, at most."""

    books: Annotated[Path, described("Folder of novels, NAME.txt or NAME.txt.gz.")]
    out: Annotated[Path, described("Folder for checkpoint/, training_log.jsonl and cached token ids.")]
    resume: Annotated[Path | None, described("A checkpoint folder to go on from (the optimiser starts anew).")] = None
    seed: Annotated[Seed, described("Seed of weights and rows.")] = 0
    threads: Annotated[Count, described("Threads of torch.")] = 2
    hidden: Annotated[Count, described("Width of the model, a multiple of 64.")] = 192
    layers: Annotated[Count, described("Layers of the model.")] = 5
    memory_layer: Annotated[CountOrZero, described("Layer whose keys and values are kept.")] = 2
    copy_steps: Annotated[CountOrZero, described("Updates of the stage copy.")] = 6000
    mixed_steps: Annotated[CountOrZero, described("Updates of the stage mixed.")] = 2500
    memory_steps: Annotated[CountOrZero, described("Updates of the stage memory.")] = 300
    copy_minutes: Minutes = 1e6
    mixed_minutes: Minutes = 1e6
    memory_minutes: Minutes = 1e6
    muon_lr: Annotated[float, described("Learning rate of the matrices.")] = 2e-3
    adam_lr: Annotated[float, described("Learning rate of all other weights.")] = 1e-3
    learnt: Annotated[float, described("Copying accuracy at which the alphabet doubles.")] = 0.9
    log_every: Annotated[Count, described("Updates between two lines of the log.")] = 25
    save_every: Annotated[float, described("Seconds between two checkpoints.")] = 180.0


@dataclass(frozen=True)
class Progress:
    """The state of a run that resuming needs besides the weights.

    step: within the stage. symbols: tokens of the alphabet that is copied. seed: of the draws that follow.
    """

    stage: str = STAGES[0]
    step: int = 0  # within the stage
    symbols: int = 64
    tokens: int = 0
    seconds: float = 0.0
    seed: int = 0


def make_model(vocabulary: int, memory_layer: int, layers: int, hidden: int) -> LlamaForCausalLM:
    """Make a Llama for memory; the field `kvbank` of its configuration says how it wants to be used."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.kvbank = {
        "mode": "memlong",
        "positions": "near:32",
        "memory_layers": [memory_layer],
        "retrieval_layers": list(range(memory_layer, layers)),
        "chunk": CHUNK,
        "context": "isolated",
        "window": 256,
        "top_k": 4,
        "recent": 4,
        "sinks": 0,
        "session": {"window": 128, "recent": 0},
    }
    return LlamaForCausalLM(config)


def layout_of(model: LlamaForCausalLM) -> MemoryLayout:
    """Return the memory layout that the configuration of a model states."""
    memory = model.config.kvbank
    return MemoryLayout(memory["memory_layers"][0], tuple(memory["retrieval_layers"]))


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, float]:
    """Return the mean loss over the tokens to be predicted, and the share of them that greedy decoding gets right."""
    layout = layout_of(model)
    memory = None if batch.chunks is None else encode_chunks(model, batch.chunks, layout.memory_layer)
    hidden = hidden_states(model, batch.local, memory, layout.retrieval_layers)
    wanted = batch.loss[:, 1:]
    logits = model.lm_head(hidden[:, :-1][wanted])
    targets = batch.local[:, 1:][wanted]
    accuracy = (logits.detach().argmax(-1) == targets).float().mean().item()
    return functional.cross_entropy(logits, targets), accuracy


def draw(tasks: Tasks, progress: Progress) -> dict[str, Batch]:
    """Draw the batches of one step, by task; every eighth is without memory, which the model has to bear."""
    if progress.stage == "copy":
        # Every eighth step inside the row: the model also has to copy from its own window.
        return {"copy": tasks.copying(16, progress.symbols, memory=progress.step % 8 != 7)}
    memory = progress.step % 8 != 7
    batches = {"natural": tasks.natural(6, memory=memory)}
    if progress.step % 2:
        batches["copy"] = tasks.copying(2, progress.symbols, memory=memory)
    else:
        batches["facts"] = tasks.facts(4)
    return batches


def rate(progress: Progress, left: float, since_start: int) -> float:
    """Return the factor on the learning rates: warm-up (again after each start), constant, then falling.

    left: share of the stage that is left. since_start: steps since this start. The last stage begins as low as the one
    before it ended.
    """
    falling = 1.0 if progress.stage == "copy" else min(1.0, max(left / DECAY, 0.05))
    return min((since_start + 1) / WARM_UP, falling) * (0.1 if progress.stage == "memory" else 1.0)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, progress: Progress, folder: Path) -> None:
    """Save weights in bfloat16, tokenizer and progress, all of them or none."""
    temporary = folder.with_name(folder.name + ".partial")
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "progress.json").write_text(json.dumps(asdict(progress)) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for path in temporary.iterdir():
        path.replace(folder / path.name)
    temporary.rmdir()


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, Progress]:
    """Load what `save` wrote, with the weights in float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    return model, AutoTokenizer.from_pretrained(folder), progress


def tokenized_texts(tokenizer: PreTrainedTokenizerFast, books: Path, cache: Path) -> list[np.ndarray]:
    """Return the token ids of each training novel, and of the standard library's source in parts of a novel's size.

    The ids are kept in the file `cache`, because tokenizing takes most of a minute.
    """
    if not cache.exists():
        code = "".join(stdlib_text())
        texts = {path.name: read_book(path) for path in book_paths(books)}
        texts |= {f"stdlib-{at:08d}": code[at : at + PART] for at in range(0, len(code) - PART + 1, PART)}
        ids = {name: tokenizer.encode(text, add_special_tokens=False) for name, text in texts.items()}
        arrays: dict[str, Any] = {name: np.array(tokens, dtype=np.int16) for name, tokens in ids.items()}
        np.savez(cache, **arrays)
    with np.load(cache) as stored:
        return [stored[name] for name in sorted(stored.files)]


def new_tokenizer(books: Path) -> PreTrainedTokenizerFast:
    """Train a tokenizer on a quarter of the novels and on source of the standard library."""
    texts = [text[i : i + 2000] for text in map(read_book, book_paths(books)) for i in range(0, len(text), 8000)]
    code = [text[i : i + 2000] for text in stdlib_text() for i in range(0, len(text), 10000)]
    return train_tokenizer(texts + code)


def freeze_below(model: LlamaForCausalLM) -> None:
    """Freeze the weights that make the stored keys and values; those behind them stay trainable."""
    layer = layout_of(model).memory_layer
    frozen = [model.model.embed_tokens, *model.model.layers[:layer]]
    own = model.model.layers[layer]
    frozen += [own.input_layernorm, own.self_attn.k_proj, own.self_attn.v_proj]
    for module in frozen:
        module.requires_grad_(False)


class Run:
    """One start of the program, which goes through the stages that are left.

    The optimiser's state does not survive the program, hence the warm-up after each start.
    """

    def __init__(self, settings: SmallTraining) -> None:
        self.settings, self.out = settings, settings.out
        self.out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.progress = Progress(seed=settings.seed)
        if settings.resume:
            self.model, self.tokenizer, self.progress = load(settings.resume)
            self.log(event="resume", note="optimiser starts anew, rate is warmed up again", **asdict(self.progress))
        else:
            self.tokenizer = new_tokenizer(settings.books)
            self.model = make_model(len(self.tokenizer), settings.memory_layer, settings.layers, settings.hidden)
        books = tokenized_texts(self.tokenizer, settings.books, self.out / "texts.npz")
        # Not the same rows again after a resume: the seed of the rows moves with the step.
        self.tasks = Tasks(self.tokenizer, books, self.progress.seed * 1_000_003 + self.progress.tokens)

    def log(self, **entry: object) -> None:
        """Write one JSON line, on the screen and in the log."""
        line = json.dumps(entry)
        print(line, flush=True)
        with (self.out / "training_log.jsonl").open("a") as file:
            file.write(line + "\n")

    def stages(self) -> None:
        """Run all stages from the present one on, and save after each."""
        for stage in STAGES[STAGES.index(self.progress.stage) :]:
            if stage != self.progress.stage:
                self.progress = replace(self.progress, stage=stage, step=0)
            self.stage(getattr(self.settings, f"{stage}_steps"), 60 * getattr(self.settings, f"{stage}_minutes"))
            save(self.model, self.tokenizer, self.progress, self.out / "checkpoint")

    def stage(self, steps: int, seconds: float) -> None:
        """Train until the stage ends, by steps or by the clock (of this start)."""
        if self.progress.stage == "memory":
            freeze_below(self.model)
        optimisers = make_optimisers(self.model, self.settings.muon_lr, self.settings.adam_lr)
        seen: dict[str, float] = {}
        start, started = self.progress.step, time.monotonic()
        saved = started
        while self.progress.step < steps and time.monotonic() - started < seconds:
            began = time.monotonic()
            left = 1 - max(self.progress.step / steps, (began - started) / seconds)
            factor = rate(self.progress, left, self.progress.step - start)
            tokens = self.step(optimisers, factor, seen)
            self.progress = replace(
                self.progress,
                step=self.progress.step + 1,
                tokens=self.progress.tokens + tokens,
                seconds=round(self.progress.seconds + time.monotonic() - began, 3),
            )
            if self.progress.step % self.settings.log_every == 0 or self.progress.step == steps:
                self.log(**asdict(self.progress), rate=round(factor, 3), **{k: round(v, 4) for k, v in seen.items()})
            if time.monotonic() - saved > self.settings.save_every:
                save(self.model, self.tokenizer, self.progress, self.out / "checkpoint")
                saved = time.monotonic()
            if self.progress.stage == "copy" and not self.harder(seen):
                return

    def step(self, optimisers: list[torch.optim.Optimizer], factor: float, seen: dict[str, float]) -> int:
        """Make one update from one batch of each task, and return the number of tokens used.

        seen: running means of losses and accuracies, which are brought up to date.
        """
        tokens = 0
        for name, batch in draw(self.tasks, self.progress).items():
            loss, accuracy = batch_loss(self.model, batch)
            torch.autograd.backward(loss)
            tokens += batch.local.numel() + (0 if batch.chunks is None else batch.chunks.numel())
            label = name if batch.chunks is not None else f"{name}_alone"
            for key, value in ((f"{label}_loss", loss.item()), (f"{label}_accuracy", accuracy)):
                seen[key] = 0.95 * seen.get(key, value) + 0.05 * value
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimiser.step()
            optimiser.zero_grad()
        return tokens

    def harder(self, seen: dict[str, float]) -> bool:
        """Double the alphabet once it is learnt; return false when all of it is learnt."""
        everything = self.model.config.vocab_size - SPECIALS
        if seen.get("copy_accuracy", 0) < self.settings.learnt:
            return True
        if self.progress.symbols == everything:
            return False
        self.progress = replace(self.progress, symbols=min(2 * self.progress.symbols, everything))
        self.log(event="harder", **asdict(self.progress))
        seen.clear()
        seen["copy_accuracy"] = 0.0
        return True


@takes(SmallTraining, file=True)
def main(settings: SmallTraining) -> None:
    """Train the small model that copies from its memory, and write checkpoints and a log."""
    Run(settings).stages()


if __name__ == "__main__":
    run_program(main, "python -m model_worker.train.small")
