"""`kvbank train icae` and `kvbank icae import`: an in-context autoencoder for any model, trained or brought along."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbank.console.output import print_json, print_line
from kvbank.console.progress import Progress, progress
from kvbank.console.table import Column, print_table
from model_worker.cli.option_bounds import LARGEST_COUNT, LARGEST_SEED
from model_worker.cli.quiet import load_quietly
from model_worker.errors import InputError

if TYPE_CHECKING:
    from model_worker.icae.config import IcaeConfig
    from model_worker.icae.model import Icae

training = typer.Typer(no_args_is_help=True, help="Train what compresses.")
adapters = typer.Typer(no_args_is_help=True, help="In-context autoencoders: adapters that others trained.")


class Task(StrEnum):
    """What an adapter is trained for."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"


class Interface(StrEnum):
    """How the frozen model reads the slots."""

    SOFT = "soft"
    KV = "kv"


class Positions(StrEnum):
    """Where memory tokens stand."""

    CONTIGUOUS = "contiguous"
    SPREAD = "spread"


class Schedule(StrEnum):
    """How the learning rate goes."""

    COSINE = "cosine"
    CONSTANT = "constant"


@training.callback()
@adapters.callback()
def _group() -> None:
    """With one command typer would drop the group's name."""


SLOTS = 128  # as the paper's
_ADAPTER, _DATA, _RUN = "The adapter (ignored with --adapter)", "Data and objective", "The run"


@training.command()
def icae(
    data: Annotated[
        list[Path],
        typer.Option(
            help="Several times. pretrain: JSONL with `text`, or a plain text (.txt, .gz), which is cut into pieces. "
            "finetune: JSONL with `input`, `prompt`, `answer`.",
            rich_help_panel=_DATA,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run: adapter/, checkpoint-N/, training_log.jsonl.")],
    model: Annotated[str, typer.Option(help="kvbank-small (shipped), a model folder, or a hub id.")] = "kvbank-small",
    task: Annotated[
        Task,
        typer.Option(help="pretrain: restore and continue texts; finetune: answer.", rich_help_panel=_DATA),
    ] = Task.PRETRAIN,
    adapter: Annotated[
        str | None, typer.Option(help="Go on from this adapter (folder or hub id), as fine-tuning does.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST_COUNT,
            help="Memory tokens a span. Default: 128, or as many as the model's positions hold.",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    rate: Annotated[
        int, typer.Option(min=1, max=LARGEST_COUNT, help="Tokens a slot: compression.", rich_help_panel=_ADAPTER)
    ] = 4,
    interface: Annotated[
        Interface,
        typer.Option(
            help="soft: slots are read as embeddings (the paper); kv: as K-V of each layer (500xCompressor).",
            rich_help_panel=_ADAPTER,
        ),
    ] = Interface.SOFT,
    positions: Annotated[
        Positions,
        typer.Option(
            help="contiguous: behind the text (the paper); spread: over it (EPL).",
            rich_help_panel=_ADAPTER,
        ),
    ] = Positions.CONTIGUOUS,
    rank: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Of LoRA.", rich_help_panel=_ADAPTER)] = 128,
    alpha: Annotated[float, typer.Option(help="Of LoRA; its scale is alpha / rank.", rich_help_panel=_ADAPTER)] = 32.0,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="Of LoRA.", rich_help_panel=_ADAPTER)] = 0.05,
    targets: Annotated[
        str,
        typer.Option(
            help="Linear modules with LoRA, comma-separated, or all-linear. kv wants all-linear.",
            rich_help_panel=_ADAPTER,
        ),
    ] = "q_proj,v_proj",
    lm_row: Annotated[
        bool, typer.Option("--lm-row", help="A continuation begins with a row of its own.", rich_help_panel=_ADAPTER)
    ] = False,
    lm_ratio: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of continuations; the rest are restorations.", rich_help_panel=_DATA
        ),
    ] = 0.4,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST_COUNT,
            help="Tokens of a context at most. Default: one span; finetune: ten spans.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    leave: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_COUNT, help="First tokens of a continuation without loss.", rich_help_panel=_DATA
        ),
    ] = 8,
    min_lm: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=LARGEST_COUNT,
            help="Tokens that a continuation must exceed, else its text is restored. Default: 64, or half a context.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            help="finetune: put the chat template, where the model has one, around context and prompt.",
            rich_help_panel=_DATA,
        ),
    ] = True,
    eval_data: Annotated[
        list[Path] | None, typer.Option(help="Held-back data of the same form.", rich_help_panel=_DATA)
    ] = None,
    passes: Annotated[
        int,
        typer.Option(
            min=1, max=LARGEST_COUNT, help="Draws from each text, each anew (pretrain).", rich_help_panel=_DATA
        ),
    ] = 1,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=LARGEST_COUNT, help="Updates. Default: once through the data.", rich_help_panel=_RUN),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.001, help="End by the clock; the rate falls accordingly.", rich_help_panel=_RUN),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Contexts at a time.", rich_help_panel=_RUN)] = 8,
    accumulate: Annotated[
        int, typer.Option(min=1, max=LARGEST_COUNT, help="Batches an update.", rich_help_panel=_RUN)
    ] = 1,
    lr: Annotated[
        float | None,
        typer.Option(help="Above 0. Default: 1e-4; finetune: 5e-5. Small models want 1e-3.", rich_help_panel=_RUN),
    ] = None,
    warm_up: Annotated[int, typer.Option(min=0, max=LARGEST_COUNT, help="Updates.", rich_help_panel=_RUN)] = 300,
    schedule: Annotated[Schedule, typer.Option(help="Of the rate.", rich_help_panel=_RUN)] = Schedule.COSINE,
    clip: Annotated[float, typer.Option(min=0.0, help="Norm of the gradient at most.", rich_help_panel=_RUN)] = 2.0,
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16", help="Compute in bfloat16. There is no fp16: ICAE does not train in it.", rich_help_panel=_RUN
        ),
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, a third more time.", rich_help_panel=_RUN),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.", rich_help_panel=_RUN)] = "auto",
    seed: Annotated[
        int,
        typer.Option(min=-LARGEST_SEED, max=LARGEST_SEED, help="Of weights, order and draws.", rich_help_panel=_RUN),
    ] = 0,
    log_every: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Updates.", rich_help_panel=_RUN)] = 10,
    eval_every: Annotated[
        int, typer.Option(min=0, max=LARGEST_COUNT, help="Updates; 0: only at the end.", rich_help_panel=_RUN)
    ] = 0,
    save_every: Annotated[
        int, typer.Option(min=0, max=LARGEST_COUNT, help="Updates; 0: only at the end.", rich_help_panel=_RUN)
    ] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out, exactly.", rich_help_panel=_RUN)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train an ICAE adapter: LoRA and memory tokens that turn a text into a few slots which the frozen model reads.

    First pretrain on plain text (restore the text from its slots, and continue it), then, if questions are to be
    answered from slots, finetune with --adapter on instructions. Losses are in nats a token and logged apart: ae_loss
    (restoration) should fall towards 0, lm_loss (continuation) cannot. A plateau near 2 is normal; a higher rate helps
    to leave it. Only the adapter is written, never the base. It is bound to the values of the base's weights:
    loaded in another dtype, which rounds them, the base is another one.

    Example: kvbank train icae --data book.txt --out run --slots 16 --rank 64 --targets all-linear --positions spread
    --lr 2e-3 --minutes 30
    """
    from model_worker.icae.config import IcaeConfig
    from model_worker.icae.data import SampleRules, chat_delimiters
    from model_worker.icae.trainer import TrainSettings, train

    finetunes = task is Task.FINETUNE
    settings = TrainSettings(
        out=out,
        steps=steps,
        minutes=minutes,
        batch=batch,
        accumulate=accumulate,
        rate=(5e-5 if finetunes else 1e-4) if lr is None else lr,
        warm_up=warm_up,
        schedule=schedule.value,
        clip=clip,
        bf16=bf16,
        checkpointing=gradient_checkpointing,
        seed=seed,
        log_every=log_every,
        eval_every=eval_every,
        save_every=save_every,
    )
    start = _start(out, resume)
    loaded, tokenizer = _load(model, device)
    delimiters = chat_delimiters(tokenizer) if finetunes and chat else ((), ())
    config = IcaeConfig(slots or SLOTS, rate, interface.value, positions.value, lm_row, *delimiters)
    if slots is None:
        config = _fitted(config, loaded)
    lora = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": _targets(targets), "seed": seed}
    made = _adapter(loaded, adapter, config, lora, finetunes)
    limit = context or made.config.capacity * (10 if finetunes else 1)
    if not finetunes:
        made.config.check_context(limit, made.limit)
    rules = SampleRules(lm_ratio, limit, leave, min(64, max(limit // 2, leave)) if min_lm is None else min_lm)
    with progress() as show:
        samples = _samples(data, tokenizer, made, rules, show, finetunes=finetunes, seed=seed, passes=passes)
        held = _samples(eval_data, tokenizer, made, rules, show, finetunes=finetunes, seed=seed) if eval_data else None
        report = train(
            made,
            samples,
            settings,
            held_out=held,
            resume=start,
            progress=lambda done, total, share: show("training", done, total),
        )
    if as_json:
        print_json(asdict(report))
        return
    rows = []
    for name in sorted({*report.losses, *report.evaluation}):
        values = (part.get(name) for part in (report.losses, report.evaluation))
        rows.append((name, *("" if value is None else f"{value:.3f}" for value in values)))
    title = f"{report.steps} updates in {report.seconds:.0f} s"
    print_table(_LOSSES, rows, title=title, caption=f"adapter: {report.adapter}")


_LOSSES = (Column("nats a token", "word"), *map(Column, ("training, last", "held back")))


@adapters.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' v2 checkpoint: one safetensors file.")],
    out: Annotated[Path, typer.Argument(help="Folder of the adapter; new, or empty.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model it was trained for (mistralai/Mistral-7B-Instruct-v0.2 for the authors' own). The adapter "
            "is loaded on it and bound to it. Without: taken on trust, and any model that it fits is accepted later."
        ),
    ] = None,
    rate: Annotated[
        int, typer.Option(min=1, max=LARGEST_COUNT, help="Tokens a slot, which the file does not say.")
    ] = 4,
    alpha: Annotated[float, typer.Option(help="Of LoRA, which the file does not say either.")] = 32.0,
    prefix_ids: Annotated[
        str,
        typer.Option(help="Ids in front of the slots when a question is answered; the authors': 1,733,16289,28793."),
    ] = "",
    suffix_ids: Annotated[str, typer.Option(help="Ids behind the question; the authors': 733,28748,16289,28793.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make an adapter of an official ICAE v2 checkpoint: the folder that `icae:adapter=DIR` and --adapter take.

    LoRA and memory tokens are kept, copies of the base are left out. The names in the file were taken from the authors'
    code; no released file was at hand.

    Example: kvbank icae import icae_v2.safetensors adapter --model mistralai/Mistral-7B-Instruct-v0.2
    """
    from model_worker.icae.official import import_official

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: give a new folder")
    ids = {"prefix_ids": _ids("prefix-ids", prefix_ids), "suffix_ids": _ids("suffix-ids", suffix_ids)}
    base = None if model is None else _load(model, "cpu")[0]
    name = "" if model is None or Path(model).exists() else model
    try:
        config = import_official(checkpoint, out, rate=rate, alpha=alpha, base=base, name=name, **ids)
        digest = "" if base is None else _bound(base, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from None
    if as_json:
        print_json({"adapter": str(out), "digest": digest, **asdict(config)})
        return
    bound = f"bound to {model}, digest {digest}" if model else "bound to no model: --model would try and bind it"
    print_line(f"{out}: {config.slots} slots of {config.rate} tokens, {bound}")


def _bound(base: Any, folder: Path) -> str:
    """Load an adapter and write it again with its digest; one that does not fit is removed."""
    from model_worker.icae.model import Icae

    try:
        icae = Icae.from_pretrained(base, folder)
    except InputError:
        shutil.rmtree(folder.resolve())
        raise
    icae.save_pretrained(folder)
    return icae.digest


def _ids(option: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise InputError(f"--{option} takes token ids between commas, not {text!r}")
    return tuple(int(word) for word in words)


def _start(out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from; nothing of an earlier run is overwritten unasked."""
    from model_worker.icae.trainer import last_checkpoint

    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: --out is the folder of the run")
    if resume:
        return last_checkpoint(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: give another folder, or --resume")
    return None


def _load(model: str, device: str) -> tuple[Any, Any]:
    from model_worker.attachment.loading import device_named

    return load_quietly(model, device=device_named(device))


def _fitted(config: "IcaeConfig", base: Any) -> "IcaeConfig":
    """With as many slots as fit, where the default has too many. With none, making the adapter says so."""
    positions = getattr(base.config, "max_position_embeddings", None) or config.needed()
    return replace(config, slots=max(1, min(config.slots, config.fitting(positions))))


def _targets(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("targets names no module")
    return "all-linear" if names == ["all-linear"] else names


def _adapter(base: Any, name: str | None, config: Any, lora: dict[str, Any], finetunes: bool) -> "Icae":
    """A new adapter, or one to go on with; instructions bring their delimiters into its configuration."""
    from model_worker.icae.model import Icae

    if name is None:
        return Icae.create(base, config, **lora)
    made = Icae.from_pretrained(base, name, trainable=True)
    if finetunes:
        made.config = replace(made.config, prefix_ids=config.prefix_ids, suffix_ids=config.suffix_ids)
    return made


def _samples(
    paths: list[Path],
    tokenizer: Any,
    icae: "Icae",
    rules: Any,
    show: Progress,
    *,
    finetunes: bool,
    seed: int,
    passes: int = 1,
) -> Any:
    from torch.utils.data import ConcatDataset

    from model_worker.icae.data import (
        INSTRUCTION,
        PRETRAINING,
        InstructionSet,
        JsonLines,
        JsonTexts,
        PretrainingSet,
        TextEncoder,
        text_pieces,
    )
    from model_worker.icae.objectives import needed

    encoder = TextEncoder(tokenizer, icae.bos)

    def shown(what: str) -> Callable[[int, int], None]:
        return partial(show, what)

    def lines(path: Path, fields: tuple[str, ...]) -> JsonLines:
        return JsonLines(path, fields, shown(f"checking {path.name}"))

    def instructions(path: Path) -> InstructionSet:
        made = InstructionSet(lines(path, INSTRUCTION), encoder, icae.eos, context=rules.context)
        made.check_fits(lambda sample: needed(icae, sample), icae.limit, shown(f"measuring {path.name}"))
        return made

    if finetunes:
        return ConcatDataset([instructions(path) for path in paths])
    # Long enough that windows are drawn from anywhere, short enough that a pass sees most of a book.
    piece = 4 * rules.context
    texts = [
        JsonTexts(lines(path, PRETRAINING), encoder)
        if path.suffix in (".jsonl", ".json")
        else text_pieces(path, encoder, piece)
        for path in paths
    ]
    return PretrainingSet(texts, rules, icae.eos, seed=seed, passes=passes)
