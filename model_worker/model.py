"""MemoryModel: a language model with a memory that lasts. What users import."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import kvbank
from model_worker.arguments import of_kind, text_or_ids, texts_or_ids, whole
from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.loading import load_model
from model_worker.attachment.model_names import SHIPPED
from model_worker.attachment.model_parts import decoder_of
from model_worker.compress import Compressor, local_rule
from model_worker.errors import InputError
from model_worker.remember.chunking import chunks, sentence_ends
from model_worker.remember.embedding import Embedder, embedder
from model_worker.remember.memory import Memory
from model_worker.remember.spool import user_spool
from model_worker.user_text import encode_text, readable
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.generation import generated, generation_options

# Ids also as an array or tensor, or as a tokenizer gives them; see `arguments.text_or_ids`.
Text = str | Sequence[int] | Mapping[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Losses:
    """Next-token losses over a text.

    nll: `[T - 1]` nats, of tokens 1 to T-1. blocks: `[T - 1]` the block each predicted token stands in.
    """

    nll: Tensor
    blocks: Tensor

    def by_block(self) -> Tensor:
        """Mean loss of each block, for intervals over blocks."""
        count = torch.bincount(self.blocks)
        sums = torch.bincount(self.blocks, weights=self.nll.double())
        return (sums / count.clamp(min=1))[count > 0]


class MemoryModel:
    """A transformers model attached to one bank of a memory service.

    memory: `host:port`, a folder, or a client (which is then not closed). Unless `strict`, chunks wait in a spool while
    the service is away: a folder of the user's for this bank, or `spool`. window: local tokens; at least a chunk.
    local: `tova:m=N` lets each layer attend to N local tokens of whatever age instead of the window, when generating
    and measuring losses (what stays is the local rule's choice; what is remembered still leaves with the window).
    attach_options go to `attach`. See `Memory` for the other settings; those left out come from the model's `kvbank`
    configuration entry, where it has one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        memory: str | Path | kvbank.Client,
        bank: str | Sequence[str] = "default",
        window: int | None = None,
        chunk: int | None = None,
        top_k: int | None = None,
        embed: str | os.PathLike[str] | Embedder = "lexical",
        compressor: str | Compressor = "none",
        local: str | None = None,
        capacity: kvbank.Capacity | None = None,
        policy: kvbank.Policy | None = None,
        store_dtype: str | None = None,
        attach_options: dict[str, Any] | None = None,
        **memory_options: Any,
    ):
        self.model, self.tokenizer = model, tokenizer
        made_for = getattr(model.config, "kvbank", None) or {}
        self.chunk = whole("chunk", made_for.get("chunk", 64) if chunk is None else chunk)
        self.window = whole("window", made_for.get("window", max(256, self.chunk)) if window is None else window)
        self.local = local_rule(None if local is None else of_kind("local", local, str))
        options = {} if attach_options is None else of_kind("attach_options", attach_options, dict)
        if unknown := options.keys() - inspect.signature(attach).parameters.keys():
            raise InputError(f"attach has no option {', '.join(map(str, unknown))}")
        self._owned = not isinstance(memory, kvbank.Client)
        self._memory_options = {
            "embedder": embedder(embed),
            "compressor": compressor,
            "chunk": self.chunk,
            "top_k": made_for.get("top_k", 4) if top_k is None else top_k,
            **memory_options,
        }
        self.attachment: Attachment = attach(model, tokenizer, **options)
        try:
            self.client = memory if isinstance(memory, kvbank.Client) else kvbank.connect(memory)
        except BaseException:
            self.attachment.detach()
            raise
        try:
            self.memory = self._memory(bank)
            self._check_lengths()
            self._open(self.memory, capacity=capacity, policy=policy, dtype=store_dtype)
        except BaseException:
            self._let_go()
            raise

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = SHIPPED,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        rope: str | None = None,
        **options: Any,
    ) -> Self:
        """Load the shipped model, a folder or a hub id, and attach it. rope as in `load_model`; options: see above."""
        return cls(*load_model(name, device=device, dtype=dtype, rope=rope), **options)

    # -- reading --------------------------------------------------------------------------------------------------

    def read(
        self,
        text: Text,
        progress: Progress | None = None,
        *,
        memory: Memory | None = None,
        special_tokens: bool = False,
    ) -> int:
        """Read a long text into the bank: cut, recall, encode, compress, write. Returns the number of tokens.

        Each chunk sees itself and what it recalled, as in MemLong, and ends at the end of a sentence where it can. A
        compressor that runs the model itself sees the chunk alone.
        progress: called with (tokens done, tokens in all), between two chunks. memory: another than this model's own.
        special_tokens: see `ids`.
        """
        ids = self.ids(text, special_tokens=special_tokens)
        memory = self.memory if memory is None else of_kind("memory", memory, Memory)
        if progress is not None and not callable(progress):
            raise InputError(f"progress is called with two numbers, and a {type(progress).__name__} cannot be")
        cache = MemoryCache(self.attachment, memory, window=self.chunk)
        done = 0
        for block in chunks(ids, self.chunk, sentence_ends(self.tokenizer)):
            if memory.compressor.encodes:
                memory.remember([Captured(block, done, {}, "isolated")])
            else:
                with torch.no_grad():
                    decoder_of(self.model)(input_ids=self._tensor([block]), past_key_values=cache, use_cache=True)
                cache.flush()
            done += len(block)
            if progress is not None:
                progress(done, len(ids))
        return len(ids)

    def losses(
        self, text: Text, *, memory: Memory | None, remember_rest: bool = True, special_tokens: bool = False
    ) -> Losses:
        """Next-token losses in a stream with the local window, with or without a memory.

        What leaves the window is remembered. Use a memory with `query="past"`: a query that includes the tokens to be
        predicted would choose memory by the answer. special_tokens: see `ids`.
        """
        ids = self.ids(text, special_tokens=special_tokens)
        if len(ids) < 2:
            raise InputError("a loss needs a text of at least two tokens")
        cache = MemoryCache(self.attachment, _port(memory), window=self.window, local=self.local)
        nll = torch.cat(list(self._nll(ids, cache)))
        if memory is not None and remember_rest:
            cache.flush()
        return Losses(nll, torch.arange(1, len(ids)) // self.chunk)

    def _nll(self, ids: list[int], cache: MemoryCache) -> Iterator[Tensor]:
        """Losses block by block, so that the logits of a long text are never all there."""
        expected = None  # what the last token of a block says of the first one of the next
        for block in chunks(ids, self.chunk):
            seen = self._tensor([block])
            with torch.no_grad():
                logits = self.model(input_ids=seen, past_key_values=cache, use_cache=True, return_dict=True).logits
            logits = logits[0].float()
            predicted = logits[:-1] if expected is None else torch.cat([expected, logits[:-1]])
            yield torch.nn.functional.cross_entropy(predicted, seen[0, -len(predicted) :], reduction="none").cpu()
            expected = logits[-1:]

    # -- generating -----------------------------------------------------------------------------------------------

    def cache(self, memory: Memory | bool = True) -> MemoryCache:
        """A fresh local window for `generate`: with this model's memory, with another, or (False) with none."""
        chosen = {True: self.memory, False: None}[memory] if isinstance(memory, bool) else memory
        return MemoryCache(self.attachment, _port(chosen), window=self.window, local=self.local)

    def generate(
        self,
        prompt: Text | Sequence[Text],
        *,
        cache: MemoryCache | None = None,
        special_tokens: bool = False,
        **options: Any,
    ) -> str | list[str]:
        """Continue `prompt` (or several, as a batch) with Hugging Face `generate` and its options.

        Returns the new text, of a batch the list of them. A prompt longer than a chunk is fed in chunks, so that the
        window holds. special_tokens: see `ids`. Raises InputError for options that a memory cannot keep, such as beam
        search, by name.
        """
        texts, single = texts_or_ids("prompt", prompt)
        if not texts:
            raise InputError("there is no prompt")
        ids, mask = self._left_padded([self._ids("prompt", text, special_tokens) for text in texts])
        wanted = generation_options(self.model, self.tokenizer, options, prompt=ids.shape[1])
        wanted.setdefault("pad_token_id", self._pad_id())
        if len(ids) > 1 and wanted.get("streamer") is not None:
            raise InputError("streamer cannot be kept with several prompts: it follows one text")
        cache = self.cache() if cache is None else cache
        if not isinstance(cache, MemoryCache):
            raise InputError(f"cache is a MemoryCache, not a {type(cache).__name__}")
        if cache.get_seq_length():
            raise InputError("this cache has tokens already; start a new one, or use a session")
        seen = 0
        with torch.no_grad():
            while ids.shape[1] - seen > self.chunk:
                seen += self.chunk
                decoder_of(self.model)(
                    input_ids=ids[:, seen - self.chunk : seen],
                    attention_mask=mask[:, :seen],
                    past_key_values=cache,
                    use_cache=True,
                )
        out = generated(self.model, wanted, input_ids=ids, attention_mask=mask, past_key_values=cache)
        new = [str(self.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)) for row in out]
        return new[0] if single else new

    # -- the rest -------------------------------------------------------------------------------------------------

    def with_bank(self, bank: str | Sequence[str], **changes: Any) -> Memory:
        """Another memory over the same model and service, e.g. one that measures without counting."""
        memory = self._memory(bank, **changes)
        self._open(memory)
        return memory

    def ids(self, text: Text, *, special_tokens: bool = False) -> list[int]:
        """Token ids of a text, without a beginning or end of the tokenizer's own.

        special_tokens: read control tokens such as `<|im_end|>` in a string as what they are, as for a text that a chat
        template has made; by default they are the characters that they are written with. Ids are taken as they are.
        """
        return self._ids("text", text, special_tokens)

    def _ids(self, name: str, text: Any, special_tokens: bool) -> list[int]:
        text = text_or_ids(name, text)
        if not isinstance(text, str):
            found = text
        elif special_tokens:
            found = self.tokenizer.encode(readable(text), add_special_tokens=False, verbose=False)
        else:
            found = encode_text(self.tokenizer, readable(text))
        if not found:
            raise InputError(f"the {name} is empty")
        known = self.model.get_input_embeddings().weight.shape[0]
        if max(found) >= known:
            raise InputError(f"{name} has token {max(found)}, and the model knows those up to {known - 1}")
        return found

    def close(self) -> None:
        """Deliver what waits on disk if the service is there, detach, and close a client that was made here."""
        try:
            self.memory.deliver_spooled()
        finally:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _let_go(self) -> None:
        self.attachment.detach()
        if self._owned:
            self.client.close()

    def _memory(self, bank: str | Sequence[str], **changes: Any) -> Memory:
        return Memory(self.attachment, self.client, bank, self.tokenizer, **{**self._memory_options, **changes})

    def _open(self, memory: Memory, **settings: Any) -> None:
        banks = memory.open(**settings)
        if memory.spool is None and not memory.strict and banks:
            memory.spool = user_spool([bank.uid for bank in banks])

    def _check_lengths(self) -> None:
        if self.window < self.chunk:
            raise InputError(f"the window of {self.window} tokens is smaller than a chunk of {self.chunk}")
        trained = self.attachment.trained_length
        placed = self.memory.top_k * self.chunk if self.attachment.plan.positions == "continual" else 1
        if trained is not None and placed + self.window > trained:
            raise InputError(
                f"window {self.window} + {placed} positions of memory exceed the {trained} that the model was trained "
                "for; choose a smaller window, chunk or top_k"
            )

    def _left_padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        length = max(map(len, rows))
        ids = [[self._pad_id()] * (length - len(row)) + row for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        return self._tensor(ids), self._tensor(mask)

    def _pad_id(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=next(self.model.parameters()).device)


def _port(memory: Any) -> Any:
    """A memory that a cache can work with, or None. Raises InputError."""
    if memory is not None and not (hasattr(memory, "remember") and hasattr(memory, "recall")):
        raise InputError(f"memory is a Memory or None, not a {type(memory).__name__}")
    return memory
