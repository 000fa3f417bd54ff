"""The command `kvbank remember` stores documents by name: in a bank of texts, or with a model's K-V."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

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
    from kvbank import Client, TextMemory

# Stores a text under a name, and returns how many of its passages were written, known and removed. Takes whether those
# of an earlier state are kept, and what shows progress.
Store: TypeAlias = Callable[[str, str, bool, Progress], tuple[int, int, int]]


# Letters of a passage at most, where --letters does not say.
_LETTERS = 1000


@dataclass(frozen=True, slots=True)
class Remembered:
    """What has become of one document. removed: passages of an earlier state of the document. error: why it was left
    out; empty where it was not."""

    source: str
    written: int = 0
    known: int = 0
    removed: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class How:
    """The options that say under which name, and how, documents are stored."""

    source: Annotated[str | None, typer.Option(help="Name of the document, where there is one; else its path.")] = None
    keep: Annotated[bool, typer.Option("--keep", help="Keep passages that a document has no longer.")] = False
    letters: Annotated[
        int | None, typer.Option(min=1, max=LARGEST, help="Letters of a passage, without --model; by default 1,000.")
    ] = None


@dataclass(frozen=True, slots=True)
class ReadBy:
    """The options of a model that reads the documents."""

    model: Annotated[
        str | None,
        typer.Option(help="Let this model read them into a bank with its K-V, for kvbank chat --reads BANK."),
    ] = None
    adapter: Annotated[str | None, typer.Option(help="With --model: the folder of its adapter.")] = None
    compressor: Annotated[str, typer.Option(help="With --model: how chunks are compressed, e.g. tova:m=48.")] = "none"
    layers: Annotated[Path | None, typer.Option(help="With --model: its layers that remember, a file.")] = None
    device: Annotated[str, typer.Option(help="With --model: auto, cpu, cuda.")] = "auto"
    dtype: Annotated[str | None, typer.Option(help="With --model: float32, bfloat16 or float16.")] = None


@spread
def remember(
    paths: Annotated[list[str], typer.Argument(help="UTF-8 texts, .gz of them, patterns, or - for stdin.")],
    service: Service,
    how: How,
    read_by: ReadBy,
    bank: Annotated[str, typer.Option("--bank", "-b", help="Name of the bank; made if it is not there.")] = "default",
    embed: Embed = None,
    as_json: AsJson = False,
) -> None:
    """Store documents in a bank of texts, where kvbank search finds them. No model is needed.

    With --model that model reads them, into a bank with its keys and values:
    kvbank chat --reads BANK answers from them.

    A document has a name, its path: stored again it writes what is new, and removes what it has no longer. So a run
    that was stopped goes on when the command is called again. What is no text is left out, with a line that says why.
    kvbank chunk forget BANK --source NAME forgets a document.

    Example: kvbank remember notes.md "logs/**/*.txt" --bank library
    """
    names = documents.found(paths)
    if how.source is not None and len(names) != 1:
        raise typer.BadParameter(f"--source names one document, and there are {len(names)}")
    if read_by.model is None and read_by != ReadBy():
        raise typer.BadParameter("--adapter, --compressor, --layers, --device and --dtype are those of a --model")
    if read_by.model is not None and how.letters is not None:
        raise typer.BadParameter("--letters is for a bank of texts; leave it out with --model")
    done: list[Remembered] = []
    with service.connect() as client, progress() as show, _store(client, bank, embed, how.letters, read_by) as store:
        for number, name in enumerate(names, start=1):
            called = how.source or ("stdin" if name == documents.STDIN else name)
            done.append(_one(store, name, called, how.keep, show))
            if not as_json:
                print_line(_line(done[-1]))
            show("documents", number, len(names))
    if as_json:
        print_json([asdict(each) for each in done])
    left_out = [each for each in done if each.error]
    if left_out:
        raise Failed(f"{len(left_out)} of {len(done)} documents were left out: {left_out[0].error}")


@contextmanager
def _store(client: "Client", bank: str, embed: str | None, letters: int | None, read_by: ReadBy) -> Iterator[Store]:
    """Yield what stores a document, in a bank of texts or by a model."""
    if read_by.model is None:
        yield partial(_add_text, kvbank.TextMemory(client, bank, embed=embed, longest=letters or _LETTERS))
        return
    from model_worker.cli.documents import ModelDocuments

    given = asdict(read_by)
    loading = {name: given.pop(name) for name in ("device", "dtype", "adapter")}
    with closing(ModelDocuments(client, bank, embed=embed, loading=loading, **given)) as by_model:
        yield lambda text, source, keep, show: by_model.add(text, source, keep, partial(show, "tokens"))


def _one(store: Store, name: str, source: str, keep: bool, show: Progress) -> Remembered:
    """Store one document, and say what has become of it."""
    try:
        text = documents.read(name)
        if not text.strip():
            raise kvbank.InvalidArgument(f"{name} is empty")
        return Remembered(source, *store(text, source, keep, show))
    except kvbank.InvalidArgument as error:
        return Remembered(source, error=str(error))


def _add_text(memory: "TextMemory", text: str, source: str, keep: bool, show: Progress) -> tuple[int, int, int]:
    """Store a document in a bank of texts; return how many passages were written, known and removed."""
    added = memory.add(text, source=source, progress=lambda count: show("passages", count, None))
    removed = 0 if keep else _forget(memory, source, set(added.chunk_ids))
    return added.written, added.known, removed


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
