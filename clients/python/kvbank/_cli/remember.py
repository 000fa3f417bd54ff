"""The command `kvbank remember` stores documents in a bank of texts, by name."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

import kvbank
from kvbank._cli.bank_options import LARGEST
from kvbank._cli.common import AsJson, Service
from kvbank._cli.text_options import Embed
from kvbank.console.ending import Failed
from kvbank.console.options import spread
from kvbank.console.output import print_json, print_line
from kvbank.console.progress import Progress, progress
from kvbank.files import documents

if TYPE_CHECKING:
    from kvbank import TextMemory


@dataclass(frozen=True, slots=True)
class Remembered:
    """What has become of one document. removed: passages of an earlier state of the document. error: why it was left
    out; empty where it was not."""

    source: str
    written: int = 0
    known: int = 0
    removed: int = 0
    error: str = ""


@spread
def remember(
    paths: Annotated[list[str], typer.Argument(help="UTF-8 texts, .gz of them, patterns, or - for stdin.")],
    service: Service,
    bank: Annotated[str, typer.Option("--bank", "-b", help="Name of the bank; made if it is not there.")] = "default",
    embed: Embed = None,
    source: Annotated[str | None, typer.Option(help="Name of the document, where there is one; else its path.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep passages that a document has no longer.")] = False,
    letters: Annotated[int, typer.Option(min=1, max=LARGEST, help="Letters of a passage.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Store documents in a bank of texts, where kvbank search finds them. No model is needed.

    A document has a name, its path: stored again it writes what is new, and removes what it has no longer. So a run
    that was stopped goes on when the command is called again. What is no text is left out, with a line that says why.
    kvbank chunk rm BANK --source NAME forgets a document.

    Example: kvbank remember notes.md "logs/**/*.txt" --bank library
    """
    names = documents.found(paths)
    if source is not None and len(names) != 1:
        raise typer.BadParameter(f"--source names one document, and there are {len(names)}")
    done: list[Remembered] = []
    with service.connect() as client, progress() as show:
        memory = kvbank.TextMemory(client, bank, embed=embed, longest=letters)
        for number, name in enumerate(names, start=1):
            done.append(_one(memory, name, source or ("stdin" if name == documents.STDIN else name), keep, show))
            if not as_json:
                print_line(_line(done[-1]))
            show("documents", number, len(names))
    if as_json:
        print_json([asdict(each) for each in done])
    left_out = [each for each in done if each.error]
    if left_out:
        raise Failed(f"{len(left_out)} of {len(done)} documents were left out: {left_out[0].error}")


def _one(memory: "TextMemory", name: str, source: str, keep: bool, show: Progress) -> Remembered:
    """Store one document, and say what has become of it."""
    try:
        text = documents.read(name)
        if not text.strip():
            raise kvbank.InvalidArgument(f"{name} is empty")
        added = memory.add(text, source=source, progress=lambda count: show("passages", count, None))
    except kvbank.InvalidArgument as error:
        return Remembered(source, error=str(error))
    removed = 0 if keep else _forget(memory, source, set(added.chunk_ids))
    return Remembered(source, added.written, added.known, removed)


def _forget(memory: "TextMemory", source: str, kept: set[int]) -> int:
    """Delete the passages of a document that are not among those that it has now."""
    old = [chunk.chunk_id for chunk in memory.chunks(source=source) if chunk.chunk_id not in kept]
    return sum(
        memory.client.delete_chunks(memory.bank, old[begin : begin + 1000]) for begin in range(0, len(old), 1000)
    )


def _line(done: Remembered) -> str:
    if done.error:
        return f"left out: {done.error}"
    removed = f", {done.removed:,} removed" if done.removed else ""
    return f"{done.source}: {done.written:,} passages written, {done.known:,} known{removed}"
