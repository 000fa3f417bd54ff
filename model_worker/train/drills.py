"""Rows that can be answered from a memory alone: facts that chunks tell, and random tokens that chunks hold.

Facts come in the trained wordings of `evaluate/wordings.py`, as sentences, lines, or turns of a chat, several of them
in a chunk, about names that share a part. They are asked for anywhere in a window, by the beginning of their statement
or by a question. What evaluations ask for is never drawn: neither the wordings held out nor the seeds.

Shapes: a row has T = blocks * S local tokens, where S is the size of a chunk and of a block. K chunks are attended to.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_worker.evaluate.facts import made_up_name
from model_worker.evaluate.wordings import GROUPS, WORDINGS, WordedFact
from model_worker.user_text import encode_text

Ids = NDArray[np.int64]
_FORMS = ("complete", "complete", "question")  # a statement is completed twice as often as a question is answered
_KNOWN = 5  # first tokens of a copied span, which only say which place is meant


@dataclass(frozen=True, slots=True)
class DrillShape:
    """Sizes of a row: tokens of a chunk (S), blocks of local tokens, chunks that are attended to (K)."""

    chunk: int
    blocks: int
    attended: int


@dataclass(frozen=True, slots=True)
class DrillRow:
    """One row of a drill.

    ids: `[T]`. wanted: bool `[T]`, the tokens to be predicted. chunks: ids `[K, S]`, attended to by all blocks.
    """

    ids: Ids
    wanted: NDArray[np.bool_]
    chunks: Ids


class Drill(ABC):
    """A source of rows of one kind; all randomness comes from one seed.

    tokenizer: of the model. texts: token ids of natural texts, each longer than a row.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[Ids], shape: DrillShape, seed: int) -> None:
        self.tokenizer, self.texts, self.shape = tokenizer, texts, shape
        self.draw = random.Random(f"kvbank-drill:{type(self).__name__}:{seed}")
        special = set(tokenizer.all_special_ids)
        self.symbols = np.array([token for token in range(len(tokenizer)) if token not in special])

    @abstractmethod
    def row(self) -> DrillRow:
        """Draw the next row of this kind."""

    def _random(self, count: int, symbols: Ids | None = None) -> Ids:
        among = self.symbols if symbols is None else symbols
        return among[[self.draw.randrange(len(among)) for _ in range(count)]]

    def _natural(self, count: int) -> Ids:
        text = self.draw.choice(self.texts)
        begin = self.draw.randrange(len(text) - count)
        return text[begin : begin + count].astype(np.int64)

    def _filler(self, count: int) -> Ids:
        """Draw text that says nothing of the facts: natural text, random tokens, or a few tokens again and again."""
        kind = self.draw.random()
        if kind < 0.6:
            return self._natural(count)
        if kind < 0.8:
            return self._random(count)
        return np.resize(self._natural(self.draw.randint(1, 12)), count)

    def _begun(self, ids: Ids) -> Ids:
        """Put the token that begins a stream, where the tokenizer has one, in the place of the first token."""
        if self.tokenizer.bos_token_id is not None:
            ids[0] = self.tokenizer.bos_token_id
        return ids


class FactDrill(Drill):
    """Draws rows of facts, of which every one that is asked for stands whole in one of the chunks of its row."""

    def row(self) -> DrillRow:
        size, blocks = self.shape.chunk, self.shape.blocks
        chunks, told = self._told()
        ids = self._begun(self._filler(blocks * size))
        wanted = np.zeros(len(ids), dtype=bool)
        asked = [block for block in range(blocks) if self.draw.random() < 0.75] or [self.draw.randrange(blocks)]
        for block in asked:
            self._ask(self.draw.choice(told), block * size, ids, wanted)
        return DrillRow(ids, wanted, chunks)

    def _told(self) -> tuple[Ids, list[WordedFact]]:
        """Return chunks `[K, S]` in which facts are told, and these facts."""
        chunks = np.stack([self._filler(self.shape.chunk) for _ in range(self.shape.attended)])
        told: list[WordedFact] = []
        facts = self._facts(self.draw.randint(2, self.shape.attended + 2))
        while not told:  # a long statement in a small chunk may not fit
            for index in self.draw.sample(range(len(chunks)), len(chunks)):
                held = [next(facts) for _ in range(self.draw.choice((1, 1, 1, 2, 3)))]
                told += self._tell(held, chunks[index])
                if self.draw.random() < 0.15:
                    break
        return chunks, told

    def _facts(self, alike: int) -> Iterator[WordedFact]:
        """Yield facts about different people. alike: how many come in one wording before the wording changes."""
        used: set[str] = set()
        known: list[str] = []
        one = self.draw.random() < 0.5
        wording = WORDINGS[self.draw.choice(GROUPS["trained"])]
        while True:
            if not one or len(used) % alike == alike - 1:
                wording = WORDINGS[self.draw.choice(GROUPS["trained"])]
            name = self._name(known)
            if name in used:
                continue
            used.add(name)
            known += name.split()
            digits = self.draw.choice((3, 4, 5, 5, 5, 6, 7, 8))
            number = str(self.draw.randrange(10 ** (digits - 1), 10**digits))
            yield wording.fact(name, self.draw.choice(wording.words) if wording.words else number)

    def _name(self, known: Sequence[str]) -> str:
        """Draw a name, which shares one of its words with an earlier one in a third of all cases."""
        words = made_up_name(self.draw).split()
        if known and self.draw.random() < 1 / 3:
            words[self.draw.randrange(len(words))] = self.draw.choice(known)
        return " ".join(words)

    def _tell(self, facts: Sequence[WordedFact], chunk: Ids) -> list[WordedFact]:
        """Write the statements over a stretch of a chunk, and return the facts that fit."""
        room, told = len(chunk), list[WordedFact]()
        ids: list[int] = []
        before, behind = self.draw.choice((("", ""), ("\n", "\n"), ("\n", "\n"), ("\n", self._turn())))
        for fact in facts:
            line = encode_text(self.tokenizer, f"{before or ' '}{fact.statement}{behind}")
            if len(ids) + len(line) <= room:
                ids += line
                told.append(fact)
        begin = self.draw.randint(0, room - len(ids))
        chunk[begin : begin + len(ids)] = ids
        return told

    def _turn(self) -> str:
        """Return what a small model may go on with behind a line of a chat."""
        said = str(self.tokenizer.decode(self._natural(self.draw.randint(1, 8)), skip_special_tokens=True))
        return self.draw.choice((said, "." * self.draw.randint(1, 6))).replace("\n", " ") + "\n"

    def _ask(self, fact: WordedFact, begin: int, ids: Ids, wanted: NDArray[np.bool_]) -> None:
        """Write a question with its answer into the block that begins at `begin`, unless they do not fit."""
        size, first = self.shape.chunk, int(begin == 0)
        empty = first and self.draw.random() < 0.5
        asked = fact.asked(self.draw.choice(_FORMS))
        question = encode_text(self.tokenizer, asked if empty else f"{self.draw.choice((' ', chr(10)))}{asked}")
        answer = encode_text(self.tokenizer, f" {fact.answer}.")
        room = size - first - len(question) - len(answer)
        if room < 0:
            return
        at = begin + first + (0 if empty else self.draw.randint(0, room))
        end = at + len(question) + len(answer)
        ids[at:end] = question + answer
        wanted[at + len(question) : end] = True


class CopyDrill(Drill):
    """Draws rows in which spans of random tokens from chunks come again; half of the rows use few symbols.

    Where symbols are few, one token before is not enough to find the place: the key has to carry several.
    """

    def row(self) -> DrillRow:
        size, blocks = self.shape.chunk, self.shape.blocks
        few = self._random(self.draw.randint(8, 32)) if self.draw.random() < 0.5 else None
        chunks = self._random(self.shape.attended * size, few).reshape(-1, size)
        ids = self._begun(self._filler(blocks * size))
        wanted = np.zeros(len(ids), dtype=bool)
        for block in range(blocks):
            span = self.draw.randint(size // 2, size - 1)
            begin, at = self.draw.randint(0, size - span), block * size + self.draw.randint(1, size - span)
            ids[at : at + span] = self.draw.choice(chunks)[begin : begin + span]
            wanted[at + _KNOWN : at + span] = True
        return DrillRow(ids, wanted, chunks)
