"""`kvbank chat` begins here, with the checks that need no model.

The module is light to import: torch comes with the conversation.
"""

from typing import Annotated

import typer

from kvbank.console.keys import ApiKey
from model_worker.attachment.model_names import SHIPPED, lasting, model_folder
from model_worker.cli.chat_options import ChatOptions
from model_worker.cli.targets import Memory, Sessions, connected, folder_of, target_of
from model_worker.cli.terminal import warnings_in_one_line
from model_worker.session.folder import find_session
from model_worker.session.log import SessionLog
from model_worker.settings.flags import takes


@takes(ChatOptions)
def chat(
    options: ChatOptions,
    session: Annotated[
        str, typer.Option("--session", "-s", help="Name of the session; a new name begins one.")
    ] = "default",
    memory: Memory = None,
    api_key: ApiKey = None,
    sessions: Sessions = None,
) -> None:
    """Talk to a model that remembers, also after it was started again.

    Example: kvbank chat --session diary --memory localhost:7400
    """
    folder = folder_of(sessions, may_be_missing=True)
    found = find_session(folder, session)
    known = found[0] if found else None
    name = lasting(options.model or (known.model if known else SHIPPED))
    adapter = options.adapter or (known.adapter if known else "")
    target = target_of(memory, known)
    model_folder(name)  # what can be said at once is said before a model is loaded
    with warnings_in_one_line(), connected(target, api_key) as client, SessionLog.open(folder, session) as log:
        from model_worker.cli.conversation import run_chat

        run_chat(
            log,
            client,
            options.model_copy(update={"model": name, "adapter": lasting(adapter) if adapter else None}),
            target,
        )
