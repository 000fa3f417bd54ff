"""Text becomes samples here: JSONL files, plain texts, the sampling rules of pre-training, the layout of instructions.

A `Sample` is drawn from a seed and its number alone, never from the order in which it is asked for: a resumed run sees
what an uninterrupted one would have seen, and workers of a data loader need not agree on anything.

Sampling follows the authors' code (`pretrain_tokenize_function`) with one deviation: where a continuation is too short
to be scored, that code restores the cut-off front of the text and drops the rest; here the whole text is restored.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from torch.utils.data import Dataset

from model_worker.errors import InputError
from model_worker.icae.layout import LEAVE
from model_worker.text_files import read_book, read_bytes
from model_worker.user_text import encode_text, readable, rendered

PRETRAINING, INSTRUCTION = ("text",), ("input", "prompt", "answer")
_MARK = "\u2063kvbank\u2063"  # stands for the user's turn in a chat template


@dataclass(frozen=True)
class Sample:
    """The tokens that one loss is computed from; layout.py says in which order the decoder reads them.

    objective: `ae` (restore the context), `lm` (continue it) or `ft` (answer a prompt). context: what is encoded.
    prompt: only for `ft`. target: what the decoder is to say, EOS included where there is one. leave: first tokens of
    the target that carry no loss.
    """

    objective: str
    context: tuple[int, ...]
    target: tuple[int, ...]
    prompt: tuple[int, ...] = ()
    leave: int = 0

    @property
    def scored(self) -> tuple[int, ...]:
        """Return the tokens that carry a loss."""
        return self.target[self.leave :]


@dataclass(frozen=True)
class SampleRules:
    """The rules by which texts become samples of pre-training.

    lm_ratio: probability that a sample is a continuation (LM) rather than a restoration (AE). context: tokens of a
    context, and of a continuation, at most. leave: first tokens of a continuation without loss. min_lm: a continuation
    has more tokens than this, else the text is restored.
    """

    lm_ratio: float = 0.4
    context: int = 512
    leave: int = LEAVE
    min_lm: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.lm_ratio <= 1:
            raise InputError(f"lm_ratio is a probability, not {self.lm_ratio}")
        if self.context < 1 or self.leave < 0 or self.min_lm < self.leave:
            raise InputError(
                "context is at least 1, and min_lm at least leave: a continuation without loss teaches nothing"
            )


def restoration(context: Sequence[int], eos: int | None) -> Sample:
    """Make a sample of restoration (AE): the target is the context again, and EOS where the model has one."""
    return Sample("ae", tuple(context), (*context, *_end(eos)))


def continuation(context: Sequence[int], following: Sequence[int], leave: int) -> Sample:
    """Make a sample of continuation (LM): the target is what follows, without EOS.

    The first `leave` tokens of the target carry no loss.
    """
    return Sample("lm", tuple(context), tuple(following), leave=leave)


def instruction(context: Sequence[int], prompt: Sequence[int], answer: Sequence[int], eos: int | None) -> Sample:
    """Make a sample of fine-tuning (FT): the target is the answer to the prompt, and EOS where the model has one."""
    return Sample("ft", tuple(context), (*answer, *_end(eos)), tuple(prompt))


def _end(eos: int | None) -> tuple[int, ...]:
    return () if eos is None else (eos,)


def draw(ids: Sequence[int], rng: np.random.Generator, rules: SampleRules, eos: int | None) -> Sample:
    """Draw a sample of pre-training from a tokenized text. eos: the model's, None where it has none.

    Raises InputError for a text without tokens.
    """
    count, limit = len(ids), rules.context
    if not count:
        raise InputError("a text without tokens gives no sample")
    start = int(rng.integers(0, count - limit + 1)) if count > limit else 0
    if rng.random() < rules.lm_ratio:
        cut = start + limit if count > limit else int(rng.integers(1, count + 1))
        following = ids[cut : cut + limit]
        if len(following) > rules.min_lm:
            return continuation(ids[start:cut], following, rules.leave)
    return restoration(ids[start : start + limit], eos)


class Texts(Protocol):
    """A sequence of tokenized texts, read by number."""

    def __len__(self) -> int: ...

    def ids(self, index: int) -> Sequence[int]:
        """Return the token ids of one text, BOS in front where it has one."""
        ...


class Tokens:
    """Texts that are tokenized already, in memory."""

    def __init__(self, texts: Sequence[Sequence[int]]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def ids(self, index: int) -> Sequence[int]:
        return self._texts[index]


class TextEncoder:
    """The one way from text to ids, in training and in use.

    bos: the model's BOS, None where it has none; no other special token is ever set.
    """

    def __init__(self, tokenizer: Any, bos: int | None):
        self._tokenizer, self._bos = tokenizer, bos

    def document(self, text: str) -> list[int]:
        """Return the ids of a text from its beginning: with BOS, where the model has one."""
        return [*([] if self._bos is None else [self._bos]), *self.piece(text)]

    def piece(self, text: str) -> list[int]:
        """Return the ids of text that stands inside something else, without BOS."""
        return encode_text(self._tokenizer, readable(text))


def chat_delimiters(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a chat template puts before and behind the user's words; both empty without a template.

    Raises InputError for a template that does not leave the user's words in one piece.
    """
    if not getattr(tokenizer, "chat_template", None):
        return (), ()
    turn = [{"role": "user", "content": _MARK}]
    parts = rendered(tokenizer, turn).split(_MARK)
    if len(parts) != 2:
        raise InputError("the chat template does not leave the user's words in one piece; give the adapter no template")
    before, behind = (tuple(tokenizer.encode(part, add_special_tokens=False)) for part in parts)
    return before, behind


def is_json(path: Path) -> bool:
    """Tell by its name whether a file has JSON lines, packed or not; any other is one text."""
    return Path(path.name.removesuffix(".gz")).suffix in (".jsonl", ".json")


class JsonLines:
    """The objects of a JSONL file with these fields, all text; each is read when it is asked for.

    The whole file is checked at once. A .gz is unpacked into memory, since no line of it can be read alone. progress:
    called with (bytes done, in all). Raises InputError with `file:line` for the first bad line.
    """

    def __init__(
        self, path: Path, fields: Sequence[str], progress: Callable[[int, int], None] = lambda done, total: None
    ):
        self._path, self._fields = path, fields
        self._starts: list[tuple[int, int]] = []  # byte offset, line
        try:
            self._unpacked = read_bytes(path) if path.suffix == ".gz" else None
            total = path.stat().st_size if self._unpacked is None else len(self._unpacked)
            with self._open() as file:
                at = 0
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._checked(line, number)
                        self._starts.append((at, number))
                    at += len(line)
                    if number % 1000 == 0:
                        progress(at, total)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        if not self._starts:
            raise InputError(f"{path} has no lines")
        progress(total, total)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, str]:
        at, number = self._starts[index]
        with self._open() as file:
            file.seek(at)
            return self._checked(file.readline(), number)

    def _open(self) -> BinaryIO:
        return self._path.open("rb") if self._unpacked is None else io.BytesIO(self._unpacked)

    def where(self, index: int) -> str:
        """Return `file:line` of an object."""
        return self._at(self._starts[index][1])

    def _at(self, number: int) -> str:
        return f"{self._path}:{number}"

    def _checked(self, line: bytes, number: int) -> dict[str, str]:
        where = self._at(number)
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets without end
            raise InputError(f"{where}: not a line of JSON: {error}") from None
        if not isinstance(found, dict):
            raise InputError(f"{where}: not a JSON object but {type(found).__name__}")
        for field in self._fields:
            if not isinstance(found.get(field), str):
                what = "is missing" if field not in found else f"is {type(found[field]).__name__}, not text"
                raise InputError(f"{where}: the field {field!r} {what}; each line needs {', '.join(self._fields)}")
            if not found[field].strip():
                raise InputError(f"{where}: the field {field!r} is empty")
            if not _unicode(found[field]):
                raise InputError(f"{where}: the field {field!r} has half of a surrogate pair")
        return {field: found[field] for field in self._fields}


def _unicode(text: str) -> bool:
    """Return whether a text can be encoded: JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class JsonTexts:
    """The texts of a JSONL file with a field `text`, each with BOS in front."""

    def __init__(self, lines: JsonLines, encoder: TextEncoder):
        self._lines, self._encoder = lines, encoder

    def __len__(self) -> int:
        return len(self._lines)

    def ids(self, index: int) -> Sequence[int]:
        return self._encoder.document(self._lines[index]["text"])


def text_pieces(path: Path, encoder: TextEncoder, length: int) -> Tokens:
    """Return a plain text (or .gz) as pieces of `length` tokens, BOS in front of the first: a book is many texts.

    Lines within a paragraph are joined, as in the texts of an evaluation. Raises InputError for a file that cannot be
    read, and for one without text.
    """
    text = read_book(path)
    if not text.strip():
        raise InputError(f"{path} has no text")
    ids = encoder.document(text)
    return Tokens([ids[at : at + length] for at in range(0, len(ids), length)])


class PretrainingSet(Dataset[Sample]):
    """The samples of pre-training by number: sample i is drawn from text i modulo the number of texts, by a seed of its
    own.

    passes: how often each text is drawn from; every pass draws anew. Raises InputError where there is no text.
    """

    def __init__(
        self,
        texts: Sequence[Texts],
        rules: SampleRules,
        eos: int | None,
        *,
        seed: int = 0,
        passes: int = 1,
    ):
        self._texts, self._rules, self._eos = texts, rules, eos
        self._seed, self._passes = seed, passes
        self._ends = np.cumsum([len(part) for part in texts])
        if not sum(len(part) for part in texts):
            raise InputError("there is no text to draw samples from")

    def __len__(self) -> int:
        return int(self._ends[-1]) * self._passes

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        text = index % int(self._ends[-1])
        part = int(np.searchsorted(self._ends, text, side="right"))
        ids = self._texts[part].ids(text - (int(self._ends[part - 1]) if part else 0))
        rng = np.random.default_rng((self._seed, index))
        return draw(ids, rng, self._rules, self._eos)


class InstructionSet(Dataset[Sample]):
    """The samples of fine-tuning by number.

    A context beyond `context` tokens loses its end, as in the authors' code.
    """

    def __init__(self, lines: JsonLines, encoder: TextEncoder, eos: int | None, *, context: int = 5120):
        self._lines, self._encoder, self._eos, self._context = lines, encoder, eos, context

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        line = self._lines[index]
        context = self._encoder.document(line["input"])[: self._context]
        prompt, answer = self._encoder.piece(line["prompt"]), self._encoder.piece(line["answer"])
        return instruction(context, prompt, answer, self._eos)

    def check_fits(
        self,
        needed: Callable[[Sample], int],
        positions: int | None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Tokenize every line once, so that none ends a run in its middle.

        needed: gives the positions that a sample takes. progress: called with (lines done, in all). Raises InputError
        with `file:line` for the first line that takes more than `positions`; None: there is no limit.
        """
        if positions is None:
            return
        for index in range(len(self)):
            if (wanted := needed(self[index])) > positions:
                raise InputError(
                    f"{self._lines.where(index)}: the slots of `input`, `prompt` and `answer` need {wanted} positions, "
                    f"this model has {positions}"
                )
            progress(index + 1, len(self))
