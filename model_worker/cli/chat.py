"""`kvbank chat` begins here, with the checks that need no model.

The module is light to import: torch comes with the conversation.
"""

from typing import Annotated

import typer

from kvbank.console.keys import ApiKey
from model_worker.attachment.model_names import SHIPPED, lasting, model_folder
from model_worker.cli.chat_options import ChatOptions
from model_worker.cli.targets import Memory, connected, embedder_of_banks, session_of, target_of
from model_worker.cli.terminal import warnings_in_one_line, while_loading
from model_worker.session.begun_with import BegunWith
from model_worker.settings.flags import takes


@takes(ChatOptions)
def chat(
    options: ChatOptions,
    session: Annotated[
        str | None,
        typer.Option(
            "--session",
            "-s",
            help="Name of the session; a new name begins one. By default the first of default, default-2, ... that no "
            "other terminal has.",
        ),
    ] = None,
    memory: Memory = None,
    api_key: ApiKey = None,
) -> None:
    """Talk to a model that remembers, also after it was started again.

    Example: kvbank chat --session diary --memory localhost:7400
    """
    target = target_of(memory)
    with warnings_in_one_line(), connected(target, api_key) as client:
        name, known = session_of(client, target, session)
        begun = None if known is None else BegunWith.of(known.settings, name)
        model = lasting(options.model or (begun.model if begun and begun.model else SHIPPED))
        adapter = options.adapter or (begun.adapter if begun else "")
        model_folder(model)  # what can be said at once is said before a model is loaded
        embed = options.embed or (embedder_of_banks(client, options.reads or ()) if begun is None else None)
        fixed = {"model": model, "adapter": lasting(adapter) if adapter else None, "embed": embed}
        chosen = options.model_copy(update=fixed)
        with while_loading(f"loading {model}"):
            from model_worker.cli.conversation import open_model, run_chat

            loaded = open_model(client, chosen, begun)
        run_chat(loaded, name, chosen, begun)
