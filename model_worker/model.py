"""A language model with a memory that lasts, as users import it: read texts, generate, measure losses."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import torch
from torch import Tensor

import kvbank
from kvbank.wire.scalars import Scalar
from model_worker.arguments import of_kind, text_or_ids, texts_or_ids, whole
from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.loading import load_model
from model_worker.attachment.model_names import SHIPPED
from model_worker.attachment.model_parts import decoder_of
from model_worker.compress import local_rule
from model_worker.errors import InputError, UnsupportedModel
from model_worker.model_settings import ModelOptions, ModelSettings, check_options
from model_worker.remember.document import of_document
from model_worker.remember.memory import Memory
from model_worker.remember.passages import Passages
from model_worker.remember.reading import Local, Reading, ReadTokens, reading
from model_worker.remember.settings import MemoryOptions, MemorySettings
from model_worker.remember.spool import user_spool
from model_worker.user_text import encode_text, readable
from model_worker.window.cache import MemoryCache
from model_worker.window.chunking import chunks, sentence_ends
from model_worker.window.generation import generated, generation_options
from model_worker.window.placement import Room
from model_worker.window.recorder import Recorder
from model_worker.window.sinks import sinks_of
from model_worker.window.stepping import Step

# Ids also as an array or tensor, or as a tokenizer gives them; see `arguments.text_or_ids`.
Text = str | Sequence[int] | Mapping[str, Any]
Progress = Callable[[int, int], None]
Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Losses:
    """The next-token losses over a text of T tokens.

    nll: `[T - 1]`, nats of tokens 1 to T-1. blocks: `[T - 1]`, the number of the block in which each of them stands.
    """

    nll: Tensor
    blocks: Tensor

    def by_block(self) -> Tensor:
        """Average the losses of each block, for intervals over blocks."""
        count = torch.bincount(self.blocks)
        sums = torch.bincount(self.blocks, weights=self.nll.double())
        return (sums / count.clamp(min=1))[count > 0]


class MemoryModel:
    """A transformers model attached to one bank of a memory service, or to one bank for each row of a batch.

    memory: `host:port`, a folder, or a client (which is then not closed). bank: a name, or one for each row; it is made
    if it is not there. settings, and options in their place: see `ModelSettings`, which describes each field; what is
    left out comes from the model's `kvbank` configuration entry, where it has one. Raises InputError for settings that
    make no sense, UnsupportedModel for a model that cannot be attached, BankMismatch for a bank of another one.

    With `recall="reread"` a model that cannot be attached reads and generates too: its bank has no K-V, and whatever
    needs a memory that is attended to raises UnsupportedModel.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        memory: str | Path | kvbank.Client,
        bank: str | Sequence[str] = "default",
        settings: MemorySettings | None = None,
        **options: Unpack[ModelOptions],
    ):
        self.model, self.tokenizer = model, tokenizer
        self.settings = ModelSettings.of(settings, options, getattr(model.config, "kvbank", None) or {})
        assert self.settings.chunk is not None
        assert self.settings.window is not None
        self.chunk, self.window, self.local = self.settings.chunk, self.settings.window, local_rule(self.settings.local)
        self._owned = not isinstance(memory, kvbank.Client)
        self._attachment: Attachment | None = None
        self._memory: Memory | None = None
        self._passages: Passages | None = None
        self._reader: Reading | None = None
        self._refused = ""
        try:
            self._attachment = attach(model, tokenizer, **self.settings.attach_options or {})
        except UnsupportedModel as error:
            if self.settings.recall == "attend":
                raise
            self._refused = str(error)
        try:
            self.client = memory if isinstance(memory, kvbank.Client) else kvbank.connect(memory)
        except BaseException:
            self._detach()
            raise
        try:
            self._open_bank(bank)
        except BaseException:
            self._let_go()
            raise

    def _open_bank(self, bank: str | Sequence[str]) -> None:
        """Open the bank for attention where the model is attached, and for its texts where it re-reads them."""
        made, stats = self.settings, None
        if self._attachment is not None:
            self._memory = Memory(self._attachment, self.client, bank, self.tokenizer, made)
            self._check_lengths()
            _open(self._memory, capacity=made.capacity, policy=made.policy, dtype=made.store_dtype)
            stats = self._memory.stats
        if made.recall == "reread":
            self._passages = Passages(self.client, bank, self.tokenizer, made, stats)
            _open(self._passages, capacity=made.capacity, policy=made.policy)

    @property
    def attachment(self) -> Attachment:
        """Return what is attached to the model. Raises UnsupportedModel for a model that only re-reads."""
        return self._attended(self._attachment)

    @property
    def memory(self) -> Memory:
        """Return the model's own memory. Raises UnsupportedModel for a model that only re-reads."""
        return self._attended(self._memory)

    @property
    def passages(self) -> Passages:
        """Return the texts that the model re-reads. Raises InputError where it attends to a memory instead."""
        if self._passages is None:
            raise InputError('this model attends to its memory; make it with recall="reread" to read chunks again')
        return self._passages

    def _attended(self, part: Part | None) -> Part:
        if part is None:
            raise UnsupportedModel(f"this model reads its memory again as tokens, and attends to none: {self._refused}")
        return part

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = SHIPPED,
        *,
        memory: str | Path | kvbank.Client,
        bank: str | Sequence[str] = "default",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        rope: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        settings: MemorySettings | None = None,
        **options: Unpack[ModelOptions],
    ) -> Self:
        """Load the shipped model, a folder or a hub id, and attach it.

        device, dtype, rope, adapter: as in `load_model`. memory, bank, settings: as in `MemoryModel`. options: fields
        of `ModelSettings`, which describes each of them. Raises what `load_model` and `MemoryModel` raise.

        What is stored: chunk, context, together, compressor, source, metadata. What is recalled: top_k, recent, order,
        cadence, ahead, query, query_tokens, min_score, min_share, count, embedder (or embed), payload_cache. How:
        recall. What is local: window, local, sinks. A bank that is made: capacity, policy, store_dtype. A service that
        is away: spool, strict, patience, retry_after. The model: attach_options.
        """
        check_options(options)  # before a large model is loaded
        loaded = load_model(name, device=device, dtype=dtype, rope=rope, adapter=adapter)
        return cls(*loaded, memory=memory, bank=bank, settings=settings, **options)

    # -- reading --------------------------------------------------------------------------------------------------

    def read(
        self,
        text: Text,
        progress: Progress | None = None,
        *,
        memory: Memory | None = None,
        source: str | None = None,
        metadata: Mapping[str, Scalar] | None = None,
        begin: int = 0,
        special_tokens: bool = False,
    ) -> int:
        """Read a long text into the bank, and return its number of tokens.

        The text is cut into chunks, at the ends of sentences where possible. Chunks of context `window` are stored as
        they stand in the local window, behind the text before them, and nothing is recalled meanwhile. In context
        `isolated` the model sees each chunk with what the chunk recalled, as in MemLong, or several chunks in one
        forward, each alone, where that changes nothing of what is stored; a compressor that runs the model itself sees
        the chunk alone. progress: called with (tokens done, tokens in all), between two chunks, some of which are not
        in the bank yet; `settle` waits for them.
        memory: another than this model's own. source: the name of the document, in the metadata of its chunks: what
        was read under this name, at the same place and with the same tokens, is stored once, so that a reading which
        was interrupted is done again; `kvbank chunk forget BANK --source NAME` forgets the document. metadata: of the
        chunks of this text, beside those of the settings. begin: the chunks before this token are stored already (it is
        the first token of a chunk); the model sees a window of them. special_tokens: as in `ids`. A model that only
        re-reads is not run: chunks are stored as tokens and text.
        """
        ids = self.ids(text, special_tokens=special_tokens)
        if progress is not None and not callable(progress):
            raise InputError(f"progress is called with two numbers, and a {type(progress).__name__} cannot be")
        if source is None and metadata is None:
            self._read(ids, progress, memory, begin)
            return len(ids)
        store: Memory | Passages | None = memory or (self._memory if self._attachment is not None else self._passages)
        assert store is not None
        with of_document(store, source, metadata):
            self._read(ids, progress, memory, begin)
        return len(ids)

    def _read(self, ids: list[int], progress: Progress | None, memory: Memory | None, begin: int) -> None:
        begin = whole("begin", begin, least=0)
        reader = self._reader = self._reading(None if memory is None else of_kind("memory", memory, Memory), ids, begin)
        done = 0
        try:
            for block in chunks(ids, self.chunk, self.ends):
                start, done = done, done + len(block)
                if done <= begin - reader.before:
                    continue
                reader.feed(block, start)
                if progress is not None:
                    progress(done, len(ids))
        except BaseException:
            reader.stop()
            raise
        finally:
            self._reader = None
        reader.end()

    def settle(self) -> None:
        """Wait until all that the reading under way was fed is in the bank, so that `progress` may ask for it.

        Those of context `window` that stand in the window stay there.
        """
        if self._reader is not None:
            self._reader.settle()

    def _reading(self, memory: Memory | None, ids: list[int], begin: int) -> Reading:
        if self._attachment is None and memory is None:
            return ReadTokens(self.passages)
        chosen = self.memory if memory is None else memory
        return reading(chosen, Local(self.window, ids[: self.sinks], self.ends, begin))

    @property
    def ends(self) -> frozenset[int]:
        """Return the ids of the tokens that end a sentence, behind which chunks end where they can."""
        return sentence_ends(self.tokenizer)

    def losses(
        self, text: Text, *, memory: Memory | None, remember_rest: bool = True, special_tokens: bool = False
    ) -> Losses:
        """Measure next-token losses in a stream with the local window, with or without a memory.

        What leaves the window is remembered; remember_rest: so is what is left in it at the end. Use a memory with
        `query="past"`: a query that includes the tokens to be predicted would choose memory by the answer.
        special_tokens: see `ids`. Raises InputError for a text of less than two tokens, and for a memory that is read
        again: each block would have to be fed behind its passages and the window, which is another measurement.
        """
        if memory is not None and self.settings.recall == "reread":
            raise InputError('losses attend to a memory; make the model with recall="attend"')
        ids = self.ids(text, special_tokens=special_tokens)
        if len(ids) < 2:
            raise InputError("a loss needs a text of at least two tokens")
        cache = self._window(_port(memory))
        nll = torch.cat(list(self._nll(ids, cache)))
        if memory is not None and remember_rest:
            cache.flush()
        return Losses(nll, torch.arange(1, len(ids)) // self.chunk)

    def _nll(self, ids: list[int], cache: MemoryCache) -> Iterator[Tensor]:
        """Yield the losses block by block, so that the logits of a long text are never all there."""
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
        """Make a fresh local window for `generate`: with this model's memory, with another, or (False) with none."""
        chosen = {True: self.memory, False: None}[memory] if isinstance(memory, bool) else memory
        return self._window(_port(chosen))

    def trace(self, cache: MemoryCache, *, every: int = 1) -> AbstractContextManager[Recorder]:
        """Record why the model says what it says while the context lasts: what is recalled, and how it is attended to.

        cache: of `cache()`, which `generate` is given too. The recorder's `trace()` returns the `Trace`. It is of one
        prompt and its answer. every: look at the attention of one in so many tokens of the answer alone, which costs
        less, and take it for that of the others. Raises InputError for a cache that is traced already.
        """
        return of_kind("cache", cache, MemoryCache).trace(self.tokenizer, every)

    @property
    def sinks(self) -> int:
        """Return how many of the first tokens of a stream stay for good."""
        return sinks_of(self.settings.sinks, self.attachment, self.window, self.local, self._room.left)

    @property
    def _room(self) -> Room:
        chunks_attended = self.memory.top_k + self.memory.recent
        return Room(self.attachment, self.window, chunks_attended * self.chunk)

    def _window(self, memory: Any) -> MemoryCache:
        return MemoryCache(
            self.attachment, memory, window=self.window, local=self.local, sinks=self.sinks, ends=self.ends
        )

    def generate(
        self,
        prompt: Text | Sequence[Text],
        *,
        cache: MemoryCache | None = None,
        question: Text | Sequence[Text] | None = None,
        special_tokens: bool = False,
        progress: Progress | None = None,
        step: Step | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Continue `prompt` (or several, as a batch) with Hugging Face `generate` and its options.

        Returns the new text, of a batch the list of them. A prompt longer than a chunk is fed in chunks, so that the
        window holds. question: what the memory is asked for while the prompt is fed, one for each prompt; by default
        each chunk of a prompt is asked for, and for the last one the prompt's last `query_tokens` tokens.
        special_tokens: see `ids`. progress: called with (tokens done, tokens in all) before each chunk of such a
        prompt. step: makes the forwards of tokens that are written, in the model's place. Raises InputError for options
        that a memory cannot keep, such as beam search, by name.

        With `recall="reread"` the chunks that the question (or the prompt's end) finds are fed before the prompt, the
        best one last, by the plain model; nothing is stored, there is no `cache`, and `max_length` counts the tokens
        that are read again.
        """
        texts, single = texts_or_ids("prompt", prompt)
        if not texts:
            raise InputError("there is no prompt")
        prompts = [self._ids("prompt", text, special_tokens) for text in texts]
        questions = self._questions(question, len(prompts))
        rereads = self.settings.recall == "reread"
        if rereads:
            prompts = self._behind_passages(prompts, prompts if questions is None else questions, cache)
        ids, mask = self._left_padded(prompts)
        wanted = generation_options(self.model, self.tokenizer, options, prompt=ids.shape[1])
        wanted.setdefault("pad_token_id", self._pad_id())
        if len(ids) > 1 and wanted.get("streamer") is not None:
            raise InputError("streamer cannot be kept with several prompts: it follows one text")
        kept = {} if rereads else {"past_key_values": self._fed(cache, prompts, questions, (ids, mask), progress)}
        out = generated(self.model, wanted, step=step, input_ids=ids, attention_mask=mask, **kept)
        new = [str(self.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)) for row in out]
        return new[0] if single else new

    def _questions(self, question: Any, prompts: int) -> list[list[int]] | None:
        """Return the token ids of the question for each prompt; None where none was given."""
        if question is None:
            return None
        texts, _ = texts_or_ids("question", question)
        if len(texts) != prompts:
            raise InputError(f"there are {len(texts)} questions for {prompts} prompts")
        return [self._ids("question", text, False) for text in texts]

    def _behind_passages(
        self, prompts: list[list[int]], questions: list[list[int]], cache: MemoryCache | None
    ) -> list[list[int]]:
        """Return the prompts behind the passages that are read again. Raises InputError where they are too long."""
        if cache is not None:
            raise InputError('a cache carries a memory that is attended to; there is none with recall="reread"')
        found = self.passages.before(prompts, questions)
        most, longest = getattr(self.model.config, "max_position_embeddings", None), max(map(len, found))
        if most is not None and longest >= most:
            again = max(len(row) - len(prompt) for row, prompt in zip(found, prompts, strict=True))
            raise InputError(
                f"a prompt of {longest} tokens, {again} of them read again, leaves no room in the {most} positions of "
                "the model; choose a smaller top_k or chunk"
            )
        return found

    def _fed(
        self,
        cache: MemoryCache | None,
        prompts: list[list[int]],
        questions: list[list[int]] | None,
        padded: tuple[Tensor, Tensor],
        progress: Progress | None,
    ) -> MemoryCache:
        """Return the cache that `generate` goes on with, which asks its memory and has seen all but the last chunk.

        padded: ids and mask of the prompts, `[B, T]` each.
        """
        ids, mask = padded
        cache = self.cache() if cache is None else cache
        if not isinstance(cache, MemoryCache):
            raise InputError(f"cache is a MemoryCache, not a {type(cache).__name__}")
        if cache.get_seq_length():
            raise InputError("this cache has tokens already; start a new one, or use a session")
        if questions is not None:
            cache.ask(questions, ids.shape[1])
        seen = self._feed_all_but_a_chunk(ids, mask, cache, progress)
        if questions is None:
            cache.ask(prompts, ids.shape[1] - seen)
        return cache

    def _feed_all_but_a_chunk(self, ids: Tensor, mask: Tensor, cache: MemoryCache, progress: Progress | None) -> int:
        """Feed the beginning of prompts `[B, T]` in chunks, the first of them short, and return its length."""
        seen = 0
        with torch.no_grad():
            while (left := ids.shape[1] - seen) > self.chunk:
                if progress is not None:
                    progress(seen, ids.shape[1])
                begin, seen = seen, seen + (left - 1) % self.chunk + 1
                decoder_of(self.model)(
                    input_ids=ids[:, begin:seen],
                    attention_mask=mask[:, :seen],
                    past_key_values=cache,
                    use_cache=True,
                )
        return seen

    # -- the rest -------------------------------------------------------------------------------------------------

    def with_bank(
        self, bank: str | Sequence[str], *, client: kvbank.Client | None = None, **changes: Unpack[MemoryOptions]
    ) -> Memory:
        """Open another memory over the same model, e.g. one that measures without counting.

        client: of its service; None is this model's own. changes: fields of `MemorySettings` in which it differs from
        this model's own memory.
        """
        memory = Memory(self.attachment, client or self.client, bank, self.tokenizer, self.settings, **changes)
        _open(memory)
        return memory

    def ids(self, text: Text, *, special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text, without the beginning or end that a tokenizer adds.

        special_tokens: read control tokens such as `<|im_end|>` in a string as control tokens, as in a text that a chat
        template has made; by default they are plain characters. Ids are taken as they are.
        """
        return self._ids("text", text, special_tokens)

    def _ids(self, name: str, text: Any, special_tokens: bool) -> list[int]:
        text = text_or_ids(name, text)
        found: list[int]
        if not isinstance(text, str):
            found = text
        elif special_tokens:
            found = list(self.tokenizer.encode(readable(text), add_special_tokens=False, verbose=False))
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
            (self._memory or self.passages).deliver_spooled()
        finally:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()

    def _let_go(self) -> None:
        self._detach()
        if self._owned:
            self.client.close()

    def _check_lengths(self) -> None:
        if self.window < self.chunk:
            raise InputError(f"the window of {self.window} tokens is smaller than a chunk of {self.chunk}")
        self._room.check(self.sinks)

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


def _open(memory: Memory | Passages, **made: Any) -> None:
    """Open a memory's banks; unless it has a spool or is strict, it gets the user's own spool for them.

    made: settings of a bank that is made.
    """
    banks = memory.open(**made)
    if memory.delivery.spool is None and not memory.settings.strict and banks:
        memory.delivery.spool = user_spool([bank.uid for bank in banks])


def _port(memory: Any) -> Any:
    """Return a memory that a cache can work with, or None. Raises InputError for anything else."""
    if memory is not None and not (hasattr(memory, "remember") and hasattr(memory, "recall")):
        raise InputError(f"memory is a Memory or None, not a {type(memory).__name__}")
    return memory
