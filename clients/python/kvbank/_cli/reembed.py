"""The command `kvbank reembed` gives a bank another embedder."""

from typing import Annotated

import typer

import kvbank
from kvbank._cli.common import AsJson, Name, Service
from kvbank.console.options import spread
from kvbank.console.output import print_json, print_line
from kvbank.console.progress import progress


@spread
def reembed(
    name: Name,
    embed: Annotated[str, typer.Option(help="The new embedder, as of kvbank search.")],
    service: Service,
    as_json: AsJson = False,
) -> None:
    """Give a bank another embedder: all chunks get new vectors, beside the old ones, which answer until all is there.

    A run that was stopped goes on when the command is called again. The new bank takes the name of the old one in one
    step. Until then there are two, which take twice the room; the one under way is called BANK~reembed.

    Example: kvbank reembed library --embed minilm
    """
    with service.connect() as client, progress() as show:
        bank = kvbank.reembed(client, name, embed, progress=lambda done, total: show("chunks", done, total))
    chunks, digest = bank.usage.chunks, bank.embedding.embedder_digest
    if as_json:
        print_json({"bank": name, "chunks": chunks, "embedder_digest": digest, "dimension": bank.embedding.dimension})
    else:
        print_line(f"{name}: {chunks:,} chunks are found by {embed} (digest {digest})")
