"""The options of `kvbank chat` that say how the model talks: the command takes them, the conversation goes by them."""

from typing import Annotated

from pydantic import Field

from model_worker.settings.base import Compressor, Count, Seed, described
from model_worker.settings.model_run import ModelRun


class ChatOptions(ModelRun):
    """Options of `kvbank chat` that say how the model talks."""

    model: Annotated[
        str | None,
        described("kvbank-small (shipped), smollm2, a model folder, or a hub id; by default the session's own."),
    ] = None
    system: Annotated[str | None, described("System prompt of a new session; its tokens stay for good.")] = None
    bank: Annotated[str | None, described("Name of the bank that a new session makes for itself.")] = None
    reads: Annotated[
        tuple[str, ...] | None,
        described(
            "A bank that the session reads besides its own, such as one of `kvbank remember --model`; several times. "
            "By default those that it read last."
        ),
    ] = None
    local: Annotated[
        str | None, described("What each layer keeps of the local tokens: tova:m=N; by default the window.")
    ] = None
    compressor: Compressor = "none"
    max_new_tokens: Annotated[Count, described("Tokens of the longest answer.")] = 256
    temperature: Annotated[float, Field(ge=0), described("0 always takes the likeliest token.")] = 0.0
    seed: Annotated[Seed, described("Seed of sampling.")] = 0
    style: Annotated[
        str,
        described("Prompt: auto, template (the model's), plain (User: ...) or continue.", flag="--format"),
    ] = "auto"
    strict: Annotated[bool, described("End when the memory service is away.")] = False
    plain: Annotated[bool, described("Print answers only.")] = False
