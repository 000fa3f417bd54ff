"""The table of `lexical:idf` is counted by `python -m model_worker.train.idf`.

The novels that are held back for evaluation are not counted. Nothing is drawn at random: the same texts give the same
file.
"""

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from kvbank.console.output import print_line
from kvbank.console.progress import Progress, progress
from kvbank.embed.idf_table import IdfTable
from kvbank.embed.lexical import features, hashed
from model_worker.errors import InputError
from model_worker.settings.flags import run_program
from model_worker.text_files import passages, read_book
from model_worker.train.books import book_paths

# Letters of a chunk: about 64 tokens.
_LETTERS = 250


def counted_features(paths: list[Path], show: Progress) -> Iterator[NDArray[np.uint64]]:
    """Yield the hashes of the features of each chunk of the texts, as `lexical` sees them."""
    for done, path in enumerate(paths, start=1):
        for chunk in passages(read_book(path), _LETTERS):
            yield hashed(features(unicodedata.normalize("NFKC", chunk)))
        show("texts", done, len(paths))


def main(
    books: Annotated[list[Path], typer.Argument(help="Texts, or folders of novels without those held back.")],
    out: Annotated[Path, typer.Option(help="The file that is written.")],
) -> None:
    """Count how many chunks of the texts have each feature, and write the table of weights.

    Example: python -m model_worker.train.idf novels --out idf.npz
    """
    paths = [path for book in books for path in (book_paths(book) if book.is_dir() else [book])]
    if not paths:
        raise InputError(f"there are no texts in {', '.join(map(str, books))}")
    with progress() as show:
        table = IdfTable.counted(counted_features(paths, show))
    out.parent.mkdir(parents=True, exist_ok=True)
    table.write(out)
    print_line(f"{out}: {table.chunks:,} chunks of {len(paths)} texts, {out.stat().st_size:,} bytes, {table.digest}")


if __name__ == "__main__":
    run_program(main, "python -m model_worker.train.idf")
