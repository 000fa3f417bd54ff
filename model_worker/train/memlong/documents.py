"""The texts that are trained on: found, checked and told apart at once, tokenized when a stream comes to them."""

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_worker.errors import InputError
from model_worker.icae.data import PRETRAINING, JsonLines, is_json
from model_worker.text_files import read_book
from model_worker.user_text import encode_text, readable

Ids = NDArray[np.int32]
_SUFFIXES = (".txt", ".gz", ".jsonl", ".json")
_KEPT = 64  # documents whose tokens are kept
# Characters of a token at most, as a guess: of a text with more than so many for each token of a window, the beginning
# is enough to see that it is long enough.
_LETTERS = 16


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a document stands: a file, and a line of it where the file has many. letters: its size."""

    path: Path
    letters: int
    line: int | None = None


class Documents:
    """The documents of some files and folders, each of at least `shortest` tokens.

    without: files, and folders of files, that are left out where a folder has them. short: how many lines of JSONL were
    shorter, and are left out. show: called with (files done, in all). Raises InputError for a file that cannot be read,
    has no text, is shorter, or is one of `without`, and where no document is left.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Any,
        shortest: int,
        *,
        without: Sequence[Path] = (),
        show: Callable[[int, int], None] = lambda done, total: None,
    ):
        self._tokenizer, self._shortest, self.short = tokenizer, shortest, 0
        self._places: list[_Place] = []
        self._lines: dict[Path, JsonLines] = {}
        self._ids: OrderedDict[int, Ids] = OrderedDict()
        files = list(_files(paths, {path.resolve() for path in _files(without, ())}))
        if not files:
            raise InputError(f"no text of {', '.join(map(str, paths))} is left to train on: all of them are held out")
        for done, path in enumerate(files, 1):
            self._places += self._of_lines(path) if is_json(path) else [self._of_book(path)]
            show(done, len(files))
        if not self._places:
            raise InputError(f"no text of {', '.join(map(str, paths))} has the {shortest} tokens of a window")

    def __len__(self) -> int:
        return len(self._places)

    @property
    def letters(self) -> list[int]:
        """Return the size of each document, in characters."""
        return [place.letters for place in self._places]

    @property
    def digest(self) -> str:
        """Return what is the same for the same documents in the same order, wherever their files stand."""
        seen = [(self.name(index), place.letters) for index, place in enumerate(self._places)]
        return sha256(json.dumps(seen).encode()).hexdigest()

    def name(self, index: int) -> str:
        """Return the name of a document's file, with the line where it has many."""
        place = self._places[index]
        return place.path.name if place.line is None else f"{place.path.name}:{place.line + 1}"

    def ids(self, index: int) -> Ids:
        """Return the token ids of a document."""
        if index not in self._ids:
            place = self._places[index]
            text = read_book(place.path) if place.line is None else self._lines[place.path][place.line]["text"]
            self._ids[index] = self._encoded(text)
            if len(self._ids) > _KEPT:
                self._ids.popitem(last=False)
        self._ids.move_to_end(index)
        return self._ids[index]

    def _encoded(self, text: str) -> Ids:
        return np.array(encode_text(self._tokenizer, readable(text)), dtype=np.int32)

    def _is_long(self, text: str) -> bool:
        return len(self._encoded(text[: _LETTERS * self._shortest])) >= self._shortest

    def _of_book(self, path: Path) -> _Place:
        text = read_book(path)
        if not text.strip():
            raise InputError(f"{path} has no text")
        if not self._is_long(text) and len(self._encoded(text)) < self._shortest:
            raise InputError(f"{path} is shorter than a window of {self._shortest} tokens")
        return _Place(path, len(text))

    def _of_lines(self, path: Path) -> list[_Place]:
        self._lines[path] = lines = JsonLines(path, PRETRAINING)
        texts = (lines[line]["text"] for line in range(len(lines)))
        found = [_Place(path, len(text), line) for line, text in enumerate(texts) if self._is_long(text)]
        self.short += len(lines) - len(found)
        return found


def _files(paths: Sequence[Path], without: Collection[Path]) -> Iterator[Path]:
    """Yield the files, and those of the folders by name.

    without: files of the folders that are left out, by their resolved paths. Raises InputError for a folder without a
    text, and for such a file that is named itself.
    """
    for path in paths:
        if not path.is_dir():
            if path.resolve() in without:
                raise InputError(f"{path} is held out, and cannot be trained on too")
            yield path
            continue
        found = sorted(each for each in path.iterdir() if each.suffix in _SUFFIXES and each.is_file())
        if not found:
            raise InputError(f"there is no text in {path}: its names end with {', '.join(_SUFFIXES)}")
        yield from (each for each in found if each.resolve() not in without)
