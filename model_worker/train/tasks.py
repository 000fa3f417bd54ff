"""The rows that the small model is trained on: copying of random tokens, facts stated and asked, and natural text.

Every row has a memory of chunks. Shapes: B rows, L local tokens, C chunks a row of S tokens each. All rows of a batch
have the same sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model_worker.evaluate.facts import TRAINING_SEEDS, Fact, make_facts
from model_worker.train.lookup import ChunkLookup

CHUNK = 64
SPECIALS = 3  # ids 0..2: pad, bos, eos


@dataclass(frozen=True)
class Batch:
    """Rows of one task.

    local: ids `[B, L]`. loss: `[B, L]`, true for tokens to be predicted. chunks: ids `[B, C, S]`, or None without
    memory.
    """

    local: Tensor
    loss: Tensor
    chunks: Tensor | None


class Tasks:
    """A source of batches for each task; all randomness comes from one seeded generator.

    books: token ids of each text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, books: list[np.ndarray], seed: int) -> None:
        self.tokenizer, self.books = tokenizer, books
        self.rng = np.random.default_rng(seed)
        vocabulary = len(tokenizer)
        self.symbols = np.random.default_rng(7).permutation(np.arange(SPECIALS, vocabulary))
        self.digits = np.array(tokenizer.convert_tokens_to_ids(list("0123456789")))
        self.lookups = [ChunkLookup(book[: len(book) // CHUNK * CHUNK].reshape(-1, CHUNK)) for book in books]

    def copying(self, rows: int, symbols: int, memory: bool = True, span: int = 48, count: int = 2) -> Batch:
        """Draw rows in which a span of random tokens from a chunk (or from earlier in the row) comes again.

        Half of the rows, once the alphabet is large, use only a few symbols: there one token before is not enough to
        find the place, and the key has to carry several.
        """
        chunks = np.empty((rows, count, CHUNK), dtype=np.int64)
        for row in chunks:
            row[:] = self.rng.choice(self._alphabet(symbols), row.shape)
        local, loss = np.full((rows, 1 + span), self.tokenizer.bos_token_id), np.ones((rows, 1 + span), dtype=bool)
        loss[:, :5] = False  # the first tokens only say which place is meant
        for row, spoken in zip(chunks, local, strict=True):
            start = self.rng.integers(0, CHUNK - span + 1)
            spoken[1:] = row[self.rng.integers(count), start : start + span]
        if memory:
            return _batch(local, loss, chunks)
        first = chunks[:, :, : CHUNK // 2].reshape(rows, -1)
        spoken = first[:, -span:]
        return _batch(np.concatenate([local[:, :1], first, spoken], 1), _tail(loss, first.shape[1]), None)

    def _alphabet(self, symbols: int) -> np.ndarray:
        if symbols > 64 and self.rng.random() < 0.5:
            few = self.rng.choice(self.symbols[:symbols], self.rng.integers(8, 32), replace=False)
            return self.digits if self.rng.random() < 0.3 else few
        return self.symbols[:symbols]

    def facts(self, rows: int, length: int = 64, count: int = 4, memory: bool = True) -> Batch:
        """Draw rows of facts of one template hidden in chunks of anything; the row asks for some, one after another."""
        chunks = np.stack([self._filler(count * CHUNK) for _ in range(rows)]).reshape(rows, count, CHUNK)
        local = np.full((rows, length), self.tokenizer.bos_token_id)
        loss = np.zeros((rows, length), dtype=bool)
        for row in range(rows):
            facts = make_facts(TRAINING_SEEDS + int(self.rng.integers(1 << 40)), count + 2)
            held = [facts[i] for i in self.rng.permutation(len(facts))]
            for chunk, fact in zip(chunks[row], held, strict=False):
                self._plant(chunk, [fact])
            if self.rng.random() < 0.3:
                self._plant_two(chunks[row], held)
            self._ask(local[row], loss[row], [held[i] for i in self.rng.permutation(count)])
        return _batch(local, loss, chunks if memory else None)

    def _filler(self, length: int) -> np.ndarray:
        """Draw `length` tokens of a novel, of random tokens, or of text full of digits."""
        kind = self.rng.random()
        if kind < 0.4:
            return self._slice(int(self.rng.integers(len(self.books))), length)
        random = self.rng.choice(self.symbols, length)
        if kind < 0.7:
            return random
        return np.where(self.rng.random(length) < 0.4, self.rng.choice(self.digits, length), random)

    def _slice(self, book: int, length: int) -> np.ndarray:
        start = self.rng.integers(len(self.books[book]) - length)
        return self.books[book][start : start + length].astype(np.int64)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _plant(self, chunk: np.ndarray, facts: list[Fact]) -> None:
        """Write the statements over a random stretch of the chunk."""
        ids = self._encode(" ".join(["", *(fact.statement for fact in facts)]))[:CHUNK]
        start = self.rng.integers(CHUNK - len(ids) + 1)
        chunk[start : start + len(ids)] = ids

    def _plant_two(self, chunks: np.ndarray, held: list[Fact]) -> None:
        """Plant two facts in the first chunk: its own and one that no other chunk has."""
        self._plant(chunks[0], [held[0], held[-1]])

    def _ask(self, local: np.ndarray, loss: np.ndarray, facts: list[Fact]) -> None:
        """Write questions with their answers behind `<s>`; the number and the full stop are to be predicted."""
        at = 1
        for turn, fact in enumerate(facts):
            question = self._encode((" " if turn else "") + fact.question)
            answer = self._encode(fact.answer + ".")
            ids = (question + answer)[: len(local) - at]
            local[at : at + len(ids)] = ids
            loss[at + len(question) : at + len(ids)] = True
            at += len(ids)

    def natural(self, rows: int, length: int = 192, count: int = 4, memory: bool = True) -> Batch:
        """Draw pages of a text; their memory are earlier chunks of that text which share rare words with the query.

        The query is the text before the page, as it is in use; one time in four it is the page itself, so that memory
        is worth reading. One row in five has chunks of anywhere, so that useless memory does no harm.
        """
        local = np.full((rows, length), self.tokenizer.bos_token_id)
        chunks = np.empty((rows, count, CHUNK), dtype=np.int64)
        for row in range(rows):
            index = int(self.rng.integers(len(self.books)))
            book, start = self.books[index], int(self.rng.integers(count * CHUNK, len(self.books[index]) - length))
            local[row, 1:] = book[start : start + length - 1]
            if self.rng.random() < 0.2:
                chunks[row] = self._slice(int(self.rng.integers(len(self.books))), count * CHUNK).reshape(count, CHUNK)
                continue
            begin = start if self.rng.random() < 0.25 else max(0, start - 2 * CHUNK)
            query = book[begin : begin + 2 * CHUNK]
            chunks[row] = self.lookups[index].best(query, start // CHUNK, count)
        loss = np.ones((rows, length), dtype=bool)
        return _batch(local, loss, chunks if memory else None)


def _tail(loss: np.ndarray, before: int) -> np.ndarray:
    """Return the same targets behind `before` more tokens."""
    return np.concatenate([np.zeros((len(loss), before), dtype=bool), loss], axis=1)


def _batch(local: np.ndarray, loss: np.ndarray, chunks: np.ndarray | None) -> Batch:
    loss[:, 0] = False  # nothing predicts the first token
    return Batch(torch.from_numpy(local), torch.from_numpy(loss), None if chunks is None else torch.from_numpy(chunks))
