"""The command `kvbank search` finds the texts of a bank that are nearest to a text."""

from typing import Annotated

import typer

import kvbank
from kvbank._cli.common import AsJson, Name, Service
from kvbank._cli.text_options import Embed, Which
from kvbank.console.options import spread
from kvbank.console.output import print_json, print_line
from kvbank.console.table import Column, print_table

_FOUND = (Column("score"), Column("chunk", "word"), Column("source", "name"), Column("text", "name"))


@spread
def search(
    name: Name,
    text: Annotated[str, typer.Argument(help="What is searched for.")],
    which: Which,
    service: Service,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Show at most so many.")] = 8,
    min_score: Annotated[float | None, typer.Option(help="Leave out what scores less.")] = None,
    embed: Embed = None,
    as_json: AsJson = False,
) -> None:
    """Find the texts of a bank that are nearest to a text, the best first. The bank may be one of texts, or a model's.

    Retrieval counts, by which full banks evict, stay as they are.

    Example: kvbank search library "snow on the mill" --top-k 3 --filter "year<1950"
    """
    chosen = which.given()
    with service.connect() as client:
        memory = kvbank.TextMemory(client, name, embed=embed)
        hits = memory.search(text, top_k=top_k, min_score=min_score, filter=chosen, count=False)
    if as_json:
        print_json(
            [
                {
                    "chunk_id": hit.chunk_id,
                    "score": hit.score,
                    "text": hit.text,
                    "start": hit.chunk.start,
                    "metadata": hit.chunk.metadata,
                }
                for hit in hits
            ]
        )
    elif not hits:
        print_line("nothing was found")
    else:
        rows = ((f"{hit.score:.3f}", str(hit.chunk_id), hit.source, " ".join(hit.text.split())) for hit in hits)
        print_table(_FOUND, rows)
