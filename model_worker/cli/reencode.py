"""The command `kvbank reencode` gives a bank the K-V of another model.

The module is light to import: torch comes with the call.
"""

from typing import Annotated

import typer

from kvbank.console.keys import ApiKey
from kvbank.console.progress import progress
from model_worker.attachment.model_names import model_folder
from model_worker.cli.reencode_options import ReencodeOptions
from model_worker.cli.shown import AsJson, Shown, show
from model_worker.cli.targets import Memory, connected, target_of
from model_worker.settings.flags import takes


@takes(ReencodeOptions)
def reencode(
    options: ReencodeOptions,
    name: Annotated[str, typer.Argument(metavar="BANK", help="Name of the bank.")],
    memory: Memory = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Give a bank the K-V of another model, which reads all chunks anew, beside the old ones.

    A run that was stopped goes on when the command is called again. The new
    bank takes the name of the old one in one step; until then the old one
    answers, and the one under way is called BANK~reencode.

    Example: kvbank reencode library --model smollm2
    """
    model_folder(options.model)  # what can be said at once is said before a model is loaded
    with connected(target_of(memory), api_key) as client, progress() as bar:
        client.get_bank(name)
        from model_worker.cli.reencoding import reencoded

        bank = reencoded(client, name, options, lambda done, total: bar("chunks", done, total))
    assert bank.kv is not None
    digest, chunks = bank.kv.reader_digest, bank.usage.chunks
    document = {"bank": name, "chunks": chunks, "reader_digest": digest}
    line = f"{name}: {chunks:,} chunks have K-V of {options.model} (reader {digest})"
    show(Shown(document, [line]), as_json=as_json)
