"""Settings of MemLong's training: the options of `kvbank train memlong`, and the keys of its TOML file.

What is left out follows from the model: from the `kvbank` entry of its configuration, or from its depth. The module is
light to import: no torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from model_worker.attachment.model_names import SHIPPED
from model_worker.settings.base import Count, CountOrZero, Device, ModelName, Seed, Settings, described

_DATA, _MEMORY, _CHOICE = "Data", "Window and memory", "What a block attends to"
_TRAINED, _RUN, _MACHINE = "What is trained", "The run", "The machine"
Share = Annotated[float, Field(ge=0, le=1)]
# What may be changed when a run goes on: how long it takes, what is measured and written, where it runs.
_FREE = {"steps", "minutes", "held_out", "eval_every", "eval_blocks", "log_every", "save_every", "bf16", "device"}


class MemlongTraining(Settings):
    """Settings of one run."""

    text: Annotated[
        tuple[Path, ...],
        Field(min_length=1),
        described(
            "Texts to train on, several times: a text (.txt), JSONL with `text`, a .gz of one, or a folder of these.",
            panel=_DATA,
        ),
    ]
    held_out: Annotated[
        tuple[Path, ...], described("Texts that the losses without and with memory are measured on.", panel=_DATA)
    ] = ()
    drills: Annotated[
        float,
        Field(ge=0, le=4),
        described("Tokens of rows that ask for facts and copies in memory, for each token of text.", panel=_DATA),
    ] = 0.0
    model: ModelName = SHIPPED
    new: Annotated[
        str | None,
        described(
            "Train a fresh model of the shipped kind in the place of --model: hidden=256,layers=6. "
            "It has the tokenizer of kvbank-small."
        ),
    ] = None

    mode: Annotated[
        Literal["memlong", "per_layer"] | None,
        described("memlong: one layer's K-V serve all; per_layer: each its own. Default: memlong.", panel=_MEMORY),
    ] = None
    memory_layer: Annotated[
        CountOrZero | None,
        described("Layer whose K-V are the memory. Default: the middle one (MemLong: 13 of 26).", panel=_MEMORY),
    ] = None
    retrieval_layers: Annotated[
        str | None,
        described(
            "Layers that attend to it, comma-separated. Default: from the memory layer on every fourth.", panel=_MEMORY
        ),
    ] = None
    positions: Annotated[
        str | None,
        described("Where memory stands: near, near:N, zero or continual. Default: near:32.", panel=_MEMORY),
    ] = None
    context: Annotated[
        Literal["isolated", "window"] | None,
        described("Whether a chunk is encoded alone or in its window. Default: isolated in memlong.", panel=_MEMORY),
    ] = None
    window: Annotated[Count | None, described("Local tokens, several chunks. Default: 256.", panel=_MEMORY)] = None
    chunk: Annotated[Count | None, described("Tokens of a chunk and of a block. Default: 64.", panel=_MEMORY)] = None
    sinks: Annotated[
        CountOrZero | None, described("First tokens of a document that stay. Default: 0 in memlong.", panel=_MEMORY)
    ] = None
    memory: Annotated[Count, described("Chunks of a stream that are remembered, the last ones.", panel=_MEMORY)] = 512
    keep_memory: Annotated[
        bool, described("Keep the memory from one document to the next, as MemLong does.", panel=_MEMORY)
    ] = False

    recent: Annotated[CountOrZero | None, described("Last chunks that left the window. Default: 4.", panel=_CHOICE)] = (
        None
    )
    top_k: Annotated[Count | None, described("Chunks that are found. Default: 4.", panel=_CHOICE)] = None
    embed: Annotated[str, described("How chunks are found, as in use.", panel=_CHOICE)] = "lexical:idf"
    min_score: Annotated[
        float | None,
        described(
            "Least score of a found chunk. Default: none, or that of the model's entry for this embedder.",
            panel=_CHOICE,
        ),
    ] = None
    query_tokens: Annotated[
        Count | None, described("Past tokens that are the query. Default: three chunks.", panel=_CHOICE)
    ] = None
    only_recent: Annotated[Share, described("Share of blocks with recent chunks alone.", panel=_CHOICE)] = 0.15
    nothing: Annotated[Share, described("Share of blocks without memory.", panel=_CHOICE)] = 0.15
    other: Annotated[Share, described("Share of blocks with what is found in another stream.", panel=_CHOICE)] = 0.06
    itself: Annotated[
        Share, described("Share of blocks whose own text is the query, so that memory is worth it.", panel=_CHOICE)
    ] = 0.1

    train: Annotated[
        Literal["lora", "full"] | None,
        described("lora: an adapter; full: the weights. Default: lora, with --new full.", panel=_TRAINED),
    ] = None
    freeze_below: Annotated[
        bool | None,
        described("Freeze all up to the memory layer. Default: yes, with --new no.", panel=_TRAINED),
    ] = None
    rank: Annotated[Count, described("Rank of LoRA.", panel=_TRAINED)] = 64
    alpha: Annotated[float, Field(gt=0), described("Alpha of LoRA, scale alpha / rank.", panel=_TRAINED)] = 8.0
    dropout: Annotated[float, Field(ge=0, le=0.9), described("Dropout of LoRA.", panel=_TRAINED)] = 0.05
    targets: Annotated[str, described("Linear modules with LoRA, comma-separated.", panel=_TRAINED)] = (
        "q_proj,k_proj,v_proj,o_proj"
    )
    norms: Annotated[bool, described("Train the norms above the memory layer beside LoRA.", panel=_TRAINED)] = True
    gate: Annotated[bool, described("Train MemLong's gate, a scalar for each head.", panel=_TRAINED)] = False
    memory_gradients: Annotated[
        bool, described("Let gradients through K-V of the present step. MemLong does not.", panel=_TRAINED)
    ] = False

    streams: Annotated[Count, described("Documents that are read side by side.", panel=_RUN)] = 4
    blocks: Annotated[Count, described("Blocks of each in an update.", panel=_RUN)] = 16
    visit: Annotated[
        CountOrZero,
        described("Updates that a stream stays in a document, from anywhere in it; 0: all of it.", panel=_RUN),
    ] = 0
    steps: Annotated[Count | None, described("Updates. Default: 1000, where no minutes are given.", panel=_RUN)] = None
    minutes: Annotated[
        float | None, Field(ge=0.001), described("End by the clock; the rate falls accordingly.", panel=_RUN)
    ] = None
    accumulate: Annotated[Count, described("Rows of the streams in an update, one after the other.", panel=_RUN)] = 1
    optimiser: Annotated[
        Literal["adamw", "muon"] | None,
        described("muon: for matrices, adamw for the rest. Default: adamw for lora, else muon.", panel=_RUN),
    ] = None
    lr: Annotated[
        float | None, Field(gt=0), described("Learning rate. Default: adamw 5e-5, muon 1.5e-3.", panel=_RUN)
    ] = None
    weight_decay: Annotated[float, Field(ge=0), described("Weight decay of adamw.", panel=_RUN)] = 1e-4
    warm_up: Annotated[CountOrZero, described("Updates over which the rate rises.", panel=_RUN)] = 50
    schedule: Annotated[
        Literal["half", "cosine", "constant"], described("How the rate goes after that.", panel=_RUN)
    ] = "half"
    clip: Annotated[float, Field(ge=0), described("Norm of the gradient at most.", panel=_RUN)] = 1.0
    seed: Annotated[Seed, described("Seed of weights, texts and choices.", panel=_RUN)] = 0
    log_every: Annotated[Count, described("Updates between two lines of the log.", panel=_RUN)] = 25
    eval_every: Annotated[
        CountOrZero, described("Updates between two measurements of --held-out; 0: at the end.", panel=_RUN)
    ] = 0
    eval_blocks: Annotated[Count, described("Blocks that are scored of each held-out text.", panel=_RUN)] = 120
    save_every: Annotated[CountOrZero, described("Updates between two checkpoints; 0: none.", panel=_RUN)] = 500

    bf16: Annotated[bool, described("Compute in bfloat16.", panel=_MACHINE)] = False
    device: Annotated[Device, described("auto, cpu, cuda.", panel=_MACHINE)] = "auto"

    @property
    def fixed(self) -> dict[str, Any]:
        """Return what must be the same where a run goes on, as plain values; texts are compared by themselves."""
        return self.model_dump(mode="json", exclude={*_FREE, "text"})

    @property
    def full(self) -> bool:
        """Return whether the weights themselves are trained."""
        return self.train == "full" or (self.train is None and self.new is not None)

    @property
    def freezes(self) -> bool:
        """Return whether what makes the memory's K-V stays as it is."""
        return self.new is None if self.freeze_below is None else self.freeze_below

    @property
    def muon(self) -> bool:
        """Return whether matrices are trained by Muon."""
        return self.full if self.optimiser is None else self.optimiser == "muon"
