"""`kvbank chat` has its options here, and the checks that need no model.

The module is light to import: torch comes with the conversation.
"""

from typing import Annotated

import typer
from pydantic import Field

from model_worker.attachment.model_names import SHIPPED, model_folder
from model_worker.cli.targets import Memory, Sessions, connected, folder_of, target_of
from model_worker.cli.terminal import warnings_in_one_line
from model_worker.session.folder import find_session
from model_worker.session.log import SessionLog
from model_worker.settings.flags import takes
from model_worker.settings.model import Compressor, Count, Seed, Settings, described


class ChatOptions(Settings):
    """Options of `kvbank chat` that say how the model talks."""

    model: Annotated[
        str | None,
        described("kvbank-small (shipped), a model folder, or a hub id; by default the session's own."),
    ] = None
    window: Annotated[Count | None, described("Local tokens; the rest is in the bank.")] = None
    local: Annotated[
        str | None, described("What each layer keeps of the local tokens: tova:m=N; by default the window.")
    ] = None
    top_k: Annotated[Count | None, described("Chunks a recall.")] = None
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


@takes(ChatOptions)
def chat(
    options: ChatOptions,
    session: Annotated[str, typer.Option("--session", "-s", help="Name of the session; a new one begins.")] = "default",
    memory: Memory = None,
    sessions: Sessions = None,
) -> None:
    """Talk to a model that remembers, also after it was started again.

    Example: kvbank chat --session diary --memory localhost:7400
    """
    folder = folder_of(sessions, may_be_missing=True)
    found = find_session(folder, session)
    known = found[0] if found else None
    name = options.model or (known.model if known else SHIPPED)
    target = target_of(memory, known)
    model_folder(name)  # what can be said at once is said before a model is loaded
    with warnings_in_one_line(), connected(target) as client, SessionLog.open(folder, session) as log:
        from model_worker.cli.conversation import run_chat

        run_chat(log, client, options.model_copy(update={"model": name}), target)
