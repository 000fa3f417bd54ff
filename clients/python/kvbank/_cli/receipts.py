"""How the commands show the receipt of what was forgotten."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from kvbank._cli import common
from kvbank.console.ending import say
from kvbank.console.output import print_json, print_line

if TYPE_CHECKING:
    from kvbank import Receipt


def tell_receipt(receipt: "Receipt", as_json: bool) -> None:
    """Print a receipt, as lines or as JSON, and say on stderr what stays and what is made again."""
    if as_json:
        print_json(asdict(receipt))
        return
    _line("forgotten", receipt.target)
    _line("receipt", receipt.receipt_id)
    _line("time", common.moment(receipt.time))
    if receipt.key_id:
        _line("key", receipt.key_id)
    _line("turns", f"{receipt.turns:,}, {receipt.tokens:,} tokens")
    _line("chunks", f"{receipt.chunk_count:,}")
    _line("size", common.size(receipt.bytes))
    for place, count in sorted(receipt.places.items()):
        _line("from", f"{place} {count:,}")
    if receipt.turns_kept:
        say(f"{receipt.turns_kept:,} turn{'' if receipt.turns_kept == 1 else 's'} stay, because forks have them")
    if receipt.chunks_to_make_again:
        say(f"{receipt.chunks_to_make_again:,} chunks that had attended to it went too; a worker makes them again")
    if receipt.remains:
        say(receipt.remains)


def _line(label: str, text: str) -> None:
    print_line(f"{label:10} {text}".rstrip())
