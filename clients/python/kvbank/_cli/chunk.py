"""The commands of `kvbank chunk` look at the chunks of a bank, and delete or forget them."""

from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbank._cli import common, parse
from kvbank._cli.bank_options import LARGEST
from kvbank._cli.common import AsJson, Name, Service
from kvbank._cli.receipts import tell_receipt
from kvbank._cli.text_options import Which
from kvbank.console.options import spread
from kvbank.console.output import print_json, print_line, printable
from kvbank.console.table import Column, print_table

if TYPE_CHECKING:
    from kvbank import Chunk, Client, Filter

_CHUNKS = (
    Column("chunk", "word"),
    Column("written", "word"),
    *map(Column, ("retrieved", "tokens")),
    Column("source", "name"),
    Column("text", "name"),
)
# Chunks that one request may name.
_AT_ONCE = 1000
_LARGEST_ID = 2**63 - 1

app = typer.Typer(no_args_is_help=True, help="Look at the chunks of a bank, and delete or forget them.")


@app.command("ls")
@spread
def list_chunks(
    name: Name,
    which: Which,
    service: Service,
    limit: Annotated[int, typer.Option(min=1, max=LARGEST, help="Show at most so many.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List the chunks of a bank, oldest first.

    Example: kvbank chunk ls library --source novel.txt --limit 20
    """
    chosen = which.given()
    with service.connect() as client:
        chunks = client.list_chunks(name, filter=chosen)
        shown = list(islice(chunks, limit))
        more = next(chunks, None) is not None
    if as_json:
        print_json([_described(chunk) for chunk in shown])
        return
    rows = (
        (
            f"{chunk.chunk_id}{' pinned' if chunk.pinned else ''}",
            common.moment(chunk.create_time),
            f"{chunk.retrieval_count:,}",
            f"{chunk.stored_length:,}",
            str(chunk.metadata.get("source", "")),
            " ".join(chunk.text.split()),
        )
        for chunk in shown
    )
    print_table(_CHUNKS, rows, caption=f"there are more than these {limit:,}: --limit N" if more else None)


@app.command("show")
@spread
def show_chunk(
    name: Name,
    chunk_id: Annotated[int, typer.Argument(min=0, max=_LARGEST_ID, help="Id of the chunk.")],
    service: Service,
    as_json: AsJson = False,
) -> None:
    """Show one chunk of a bank: its text, and all that is known of it.

    Example: kvbank chunk show library 17
    """
    with service.connect() as client:
        chunk = client.get_chunk(name, chunk_id)
    if as_json:
        print_json(_described(chunk))
        return
    _line("chunk", str(chunk.chunk_id))
    _line("written", common.moment(chunk.create_time))
    _line("retrieved", f"{chunk.retrieval_count:,}, last {common.moment(chunk.last_retrieve_time)}")
    _line("expires", common.moment(chunk.expire_time))
    _line("pinned", "yes" if chunk.pinned else "no")
    _line("start", f"{chunk.start:,}")
    _line("tokens", f"{chunk.original_length:,}, {chunk.stored_length:,} stored")
    if chunk.producer is not None:
        _line("made by", f"{chunk.producer.method} {chunk.producer.context}")
    for tensor in chunk.layout:
        _line("tensor", f"{tensor.name} {tensor.dtype} {list(tensor.shape)}, {common.size(tensor.nbytes)}")
    for key, value in chunk.metadata.items():
        _line("metadata", f"{key} = {parse.written(value)}")
    print()
    print(printable(chunk.text, keep="\n\t"))


@app.command("rm")
@spread
def remove_chunks(
    name: Name,
    which: Which,
    service: Service,
    chunk_ids: Annotated[
        list[int] | None, typer.Argument(min=0, max=_LARGEST_ID, help="Ids of chunks.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete chunks by id, or all that the options select, such as those of one document.

    Example: kvbank chunk rm library --source novel.txt
    """
    chosen, ids = which.given(), list(dict.fromkeys(chunk_ids or ()))
    if (chosen is None) == (not ids):
        raise typer.BadParameter("give ids of chunks, or --filter or --source, and not both")
    with service.connect() as client:
        going = ids if chosen is None else _selected(client, name, chosen)
        if going and not yes:
            told = f"Delete {len(going):,} chunks of bank {printable(name)!r}?"
            typer.confirm(told, abort=True, err=True)
        deleted = sum(
            client.delete_chunks(name, going[begin : begin + _AT_ONCE]) for begin in range(0, len(going), _AT_ONCE)
        )
    if as_json:
        print_json({"bank": name, "deleted": deleted})
    else:
        print_line(f"deleted {deleted:,} chunks of {name}")


@app.command("forget")
@spread
def forget_chunks(
    name: Name,
    which: Which,
    service: Service,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Forget the chunks that the options select, such as those of one document, for good, and show the receipt.

    No file of the service has a byte of them then; kvbank chunk rm takes them out of all answers alone.

    Example: kvbank chunk forget library --source novel.txt
    """
    chosen = which.given()
    if chosen is None:
        raise typer.BadParameter("give --filter or --source")
    with service.connect() as client:
        if not yes:
            going = len(_selected(client, name, chosen))
            typer.confirm(f"Forget {going:,} chunks of bank {printable(name)!r} for good?", abort=True, err=True)
        receipt = client.forget_chunks(name, chosen)
    tell_receipt(receipt, as_json)


def _selected(client: "Client", name: str, chosen: "Filter") -> list[int]:
    return [chunk.chunk_id for chunk in client.list_chunks(name, filter=chosen)]


def _described(chunk: "Chunk") -> dict[str, Any]:
    """Return what is known of a chunk, for JSON."""
    names = ("chunk_id", "bank", "text", "start", "original_length", "stored_length", "metadata", "kind", "producer")
    times = ("create_time", "retrieval_count", "last_retrieve_time", "pinned", "expire_time")
    found = {name: getattr(chunk, name) for name in (*names, *times)}
    if chunk.producer is not None:
        found["producer"] = {"method": chunk.producer.method, "context": chunk.producer.context}
    return found | {"token_ids": list(chunk.token_ids)}


def _line(label: str, text: str) -> None:
    print_line(f"{label:10} {text}".rstrip())
