"""Measure what the small model is worth, on texts that it was not trained on.

`python -m model_worker.train.evaluate --model DIR --books DIR`

Recall: facts planted in a long text, read in chunks, asked in an empty window with the chunks that share most with the
question. Loss: blocks of the text behind their own window, with and without the chunks that share most with its end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from model_worker.evaluate.facts import make_facts
from model_worker.text_files import read_book
from model_worker.train.books import book_paths
from model_worker.train.lookup import ChunkLookup
from model_worker.train.memory_stage import KeyValue, encode_chunks, hidden_states
from model_worker.train.small import layout_of
from model_worker.train.tasks import Tasks
from model_worker.train.tokenizer import HELD_BACK, stdlib_text
from model_worker.window.chunking import chunks as chunks_of
from model_worker.window.chunking import sentence_ends


class Evaluation:
    """Measurements of one model with its tokenizer."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer, self.layout = model, tokenizer, layout_of(model)
        self.chunk, self.top_k = model.config.kvbank["chunk"], model.config.kvbank["top_k"]

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids `[T]` of a text, without `<s>`."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False))

    def cut(self, tokens: np.ndarray) -> np.ndarray:
        """Return chunks `[N, S]` as the worker cuts them, at ends of sentences, padded behind."""
        pieces = list(chunks_of(tokens.tolist(), self.chunk, sentence_ends(self.tokenizer)))
        padded = np.full((len(pieces), self.chunk), self.tokenizer.pad_token_id)
        for row, piece in zip(padded, pieces, strict=True):
            row[: len(piece)] = piece
        return padded

    def remember(self, chunks: np.ndarray) -> KeyValue:
        """Return keys and values of chunks `[C, S]` without their pads, as one row."""
        keys, values = encode_chunks(self.model, torch.from_numpy(chunks)[None], self.layout.memory_layer)
        real = torch.from_numpy(chunks.reshape(-1) != self.tokenizer.pad_token_id)
        return keys[:, :, real], values[:, :, real]

    def logits(self, local: list[int], memory: KeyValue | None) -> Tensor:
        """Return the logits `[L, vocabulary]` of one row."""
        hidden = hidden_states(self.model, torch.tensor([local]), memory, self.layout.retrieval_layers)
        logits: Tensor = self.model.lm_head(hidden)[0]
        return logits

    def greedy(self, prompt: str, memory: KeyValue | None, tokens: int) -> str:
        """Return the greedy continuation of `<s>` and the prompt, `tokens` tokens long."""
        local = self.tokenizer.encode(prompt)
        start = len(local)
        for _ in range(tokens):
            local.append(int(self.logits(local, memory)[-1].argmax()))
        return str(self.tokenizer.decode(local[start:]))

    def recall(self, text: str, other: str, seed: int, count: int) -> dict[str, float]:
        """Return the shares of facts answered exactly: with memory, with the other text's, with none.

        `whole` is the share of the facts whose statement stood whole in a retrieved chunk, `whole_right` the share of
        facts that were answered from such a chunk.
        """
        facts = make_facts(seed, count)
        tokens = self.encode(plant(text, [fact.statement for fact in facts]))
        texts = {"memory": tokens, "other": self.encode(other)}
        lookups = {name: ChunkLookup(self.cut(ids)) for name, ids in texts.items()}
        right = {"memory": 0, "other": 0, "none": 0, "whole": 0, "whole_right": 0}
        for fact in facts:
            wanted = len(self.encode(fact.answer))
            for name, lookup in lookups.items():
                chunks = lookup.best(self.encode(fact.question), len(lookup.chunks), self.top_k)
                answer = self.greedy(fact.question, self.remember(chunks), wanted)
                right[name] += answer == fact.answer
                # A statement cut by the border of two chunks cannot be expected to be read from either.
                whole = any(fact.statement in self.tokenizer.decode(chunk) for chunk in chunks)
                if name == "memory" and whole:
                    right["whole"] += 1
                    right["whole_right"] += answer == fact.answer
            right["none"] += self.greedy(fact.question, None, wanted) == fact.answer
        return {name: value / count for name, value in right.items()}

    def loss(self, text: str, blocks: int, window: int = 256, block: int = 64) -> dict[str, float]:
        """Return the mean loss of `blocks` blocks spread over the text, each behind tokens of its own that fill the
        window.
        """
        tokens = self.encode(text)
        chunks, before = self.cut(tokens), window - block
        lookup, ends = ChunkLookup(chunks), np.cumsum((chunks != self.tokenizer.pad_token_id).sum(1))
        sums = {"with_memory": 0.0, "without": 0.0, "wrong_memory": 0.0}
        for start in np.linspace(len(tokens) // 4, len(tokens) - block, blocks).astype(int):
            local = [self.tokenizer.bos_token_id, *tokens[start - before : start + block].tolist()]
            wanted = torch.tensor(local[-block:])
            earlier = int(np.searchsorted(ends, start - before, side="right"))
            best = lookup.best(tokens[start - self.chunk : start], earlier, self.top_k)
            wrong = lookup.chunks[(np.arange(self.top_k) * 37 + start) % earlier]
            memories = {"with_memory": self.remember(best), "without": None, "wrong_memory": self.remember(wrong)}
            for name, memory in memories.items():
                logits = self.logits(local, memory)[-block - 1 : -1]
                sums[name] += functional.cross_entropy(logits, wanted).item() / blocks
        return {name: round(value, 4) for name, value in sums.items()}

    def copying(self, rows: int, seed: int) -> dict[str, float]:
        """Return the accuracy of copying random tokens from memory and from the window."""
        tasks = Tasks(self.tokenizer, [], seed)
        found = {}
        for name, memory in (("memory", True), ("window", False)):
            batch = tasks.copying(rows, len(tasks.symbols), memory=memory)
            assert memory == (batch.chunks is not None)
            kept = None if batch.chunks is None else encode_chunks(self.model, batch.chunks, self.layout.memory_layer)
            hidden = hidden_states(self.model, batch.local, kept, self.layout.retrieval_layers)
            guess, wanted = self.model.lm_head(hidden)[:, :-1].argmax(-1), batch.loss[:, 1:]
            found[name] = (guess == batch.local[:, 1:])[wanted].float().mean().item()
        return found

    def by_layer(self, rows: int, seed: int) -> list[float]:
        """Return the accuracy of copying for each layer as the only memory layer and the only one that retrieves."""
        batch = Tasks(self.tokenizer, [], seed).copying(rows, 512)
        assert batch.chunks is not None
        found = []
        for layer in range(self.model.config.num_hidden_layers):
            kept = encode_chunks(self.model, batch.chunks, layer)
            guess = self.model.lm_head(hidden_states(self.model, batch.local, kept, (layer,)))[:, :-1].argmax(-1)
            found.append(round((guess == batch.local[:, 1:])[batch.loss[:, 1:]].float().mean().item(), 3))
        return found


def plant(text: str, sentences: list[str]) -> str:
    """Return the text with the sentences spread evenly over it, each at the end of a word."""
    pieces, at = [], 0
    for index, sentence in enumerate(sentences, start=1):
        cut = text.index(" ", len(text) * index // (len(sentences) + 2))
        pieces += [text[at:cut], " ", sentence]
        at = cut
    return "".join([*pieces, text[at:]])


def main() -> None:
    """Measure the model of the command line, and print one JSON object."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--model", required=True)
    parse.add_argument("--books", required=True)
    parse.add_argument("--facts", type=int, default=20)
    parse.add_argument("--blocks", type=int, default=60)
    parse.add_argument("--length", type=int, default=466_000, help="characters of the long text")
    parse.add_argument("--threads", type=int, default=1)
    args = parse.parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    run = Evaluation(model, AutoTokenizer.from_pretrained(args.model))
    novels = "\n".join(read_book(path) for path in book_paths(Path(args.books), held_back=True))
    code = "\n".join(stdlib_text(modules=HELD_BACK))
    texts = {"novels": (novels[: args.length], novels[-args.length :]), "code": (code[: args.length], novels)}
    with torch.no_grad():
        report: dict[str, object] = {"copying": run.copying(64, seed=1), "copying_by_layer": run.by_layer(32, seed=2)}
        for seed, (name, (text, other)) in enumerate(texts.items()):
            report[f"recall_{name}"] = run.recall(text, other[: args.length], seed=seed, count=args.facts)
            report[f"loss_{name}"] = run.loss(text, args.blocks)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
