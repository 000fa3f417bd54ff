"""Settings of the training of an ICAE adapter: the options of `kvbank train icae`, and the keys of its TOML file.

The module is light to import: no torch. The classes that do the work check what these bounds cannot say.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from model_worker.attachment.model_names import SHIPPED
from model_worker.settings.base import Count, CountOrZero, Device, ModelName, Seed, Settings, described

SLOTS = 128  # as the paper's
_ADAPTER, _DATA, _RUN = "The adapter (ignored with --adapter)", "Data and objective", "The run"
_MACHINE = "The machine"


class AdapterTraining(Settings):
    """Settings of one training run of an adapter."""

    data: Annotated[
        tuple[Path, ...],
        Field(min_length=1),
        described(
            "Files to train on, several times; each may be a .gz. pretrain: JSONL with `text`, or a plain text (.txt), "
            "which is cut into pieces. finetune: JSONL with `input`, `prompt`, `answer`.",
            panel=_DATA,
        ),
    ]
    model: ModelName = SHIPPED
    task: Annotated[
        Literal["pretrain", "finetune"],
        described("pretrain: restore and continue texts; finetune: answer.", panel=_DATA),
    ] = "pretrain"
    adapter: Annotated[str | None, described("Go on from this adapter (folder or hub id), as fine-tuning does.")] = None

    slots: Annotated[
        Count | None,
        described("Memory tokens a span. Default: 128, or as many as the model's positions hold.", panel=_ADAPTER),
    ] = None
    rate: Annotated[Count, described("Tokens a slot: compression.", panel=_ADAPTER)] = 4
    interface: Annotated[
        Literal["soft", "kv"],
        described(
            "soft: slots are read as embeddings (the paper); kv: as K-V of each layer (500xCompressor).",
            panel=_ADAPTER,
        ),
    ] = "soft"
    positions: Annotated[
        Literal["contiguous", "spread"],
        described(
            "Where memory tokens stand. contiguous: behind the text (the paper); spread: over it (EPL).",
            panel=_ADAPTER,
        ),
    ] = "contiguous"
    rank: Annotated[Count, described("Rank of LoRA.", panel=_ADAPTER)] = 128
    alpha: Annotated[float, described("Alpha of LoRA, whose scale is alpha / rank.", panel=_ADAPTER)] = 32.0
    dropout: Annotated[float, Field(ge=0, le=0.9), described("Dropout of LoRA.", panel=_ADAPTER)] = 0.05
    targets: Annotated[
        str,
        described(
            "Linear modules with LoRA, comma-separated, or all-linear. kv wants all-linear.",
            panel=_ADAPTER,
        ),
    ] = "q_proj,v_proj"
    lm_row: Annotated[bool, described("A continuation begins with a row of its own.", panel=_ADAPTER)] = False

    lm_ratio: Annotated[
        float,
        Field(ge=0, le=1),
        described("Share of continuations; the rest are restorations.", panel=_DATA),
    ] = 0.4
    context: Annotated[
        Count | None,
        described("Tokens of a context at most. Default: one span; finetune: ten spans.", panel=_DATA),
    ] = None
    leave: Annotated[CountOrZero, described("First tokens of a continuation without loss.", panel=_DATA)] = 8
    min_lm: Annotated[
        CountOrZero | None,
        described(
            "Tokens that a continuation must exceed, else its text is restored. Default: 64, or half a context.",
            panel=_DATA,
        ),
    ] = None
    chat: Annotated[
        bool,
        described(
            "finetune: put the chat template, where the model has one, around context and prompt.",
            panel=_DATA,
        ),
    ] = True
    eval_data: Annotated[tuple[Path, ...], described("Held-back data of the same form.", panel=_DATA)] = ()
    passes: Annotated[Count, described("Draws from each text, each anew (pretrain).", panel=_DATA)] = 1

    steps: Annotated[Count | None, described("Updates. Default: once through the data.", panel=_RUN)] = None
    minutes: Annotated[
        float | None,
        Field(ge=0.001),
        described("End by the clock; the rate falls accordingly.", panel=_RUN),
    ] = None
    batch: Annotated[Count, described("Contexts at a time.", panel=_RUN)] = 8
    accumulate: Annotated[Count, described("Batches an update.", panel=_RUN)] = 1
    lr: Annotated[
        float | None,
        described("Learning rate, above 0. Default: 1e-4; finetune: 5e-5. Small models want 1e-3.", panel=_RUN),
    ] = None
    warm_up: Annotated[CountOrZero, described("Updates over which the rate rises.", panel=_RUN)] = 300
    schedule: Annotated[
        Literal["cosine", "constant"], described("How the learning rate goes after it rose.", panel=_RUN)
    ] = "cosine"
    clip: Annotated[float, Field(ge=0), described("Norm of the gradient at most.", panel=_RUN)] = 2.0
    seed: Annotated[Seed, described("Seed of weights, order and draws.", panel=_RUN)] = 0
    log_every: Annotated[Count, described("Updates between two lines of the log.", panel=_RUN)] = 10
    eval_every: Annotated[
        CountOrZero, described("Updates between two evaluations; 0: only at the end.", panel=_RUN)
    ] = 0
    save_every: Annotated[
        CountOrZero, described("Updates between two checkpoints; 0: only at the end.", panel=_RUN)
    ] = 500

    bf16: Annotated[
        bool,
        described("Compute in bfloat16. There is no fp16: ICAE does not train in it.", panel=_MACHINE),
    ] = False
    gradient_checkpointing: Annotated[
        bool,
        described(
            "Less memory, a third more time.", panel=_MACHINE, flag="--gradient-checkpointing/--no-checkpointing"
        ),
    ] = False
    device: Annotated[Device, described("auto, cpu, cuda.", panel=_MACHINE)] = "auto"

    @property
    def finetunes(self) -> bool:
        """Return whether the adapter is to answer prompts."""
        return self.task == "finetune"
