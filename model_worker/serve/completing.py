"""A prompt that a model goes on with, without a session: nothing of it is kept."""

import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

import kvbank
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.remember.opening import kv_spec
from model_worker.serve.answering import START_S, Decoding, Reply
from model_worker.serve.engine import Turn
from model_worker.serve.history import History
from model_worker.serve.prompts import prompt_of
from model_worker.serve.stop_texts import StopTexts
from model_worker.serve.usage import Usage
from model_worker.user_text import begin_of
from model_worker.window.cache import MemoryCache

# Chunks that one call deletes at most, which is the service's bound.
_MOST_IDS = 1000
# How long a chunk of a request stays where its worker has died.
_LONGEST = kvbank.Expiry(timedelta(days=1))


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model goes on with. question: what its memory is asked for; None: the end of the prompt.

    stop: texts of the format before which an answer ends. stripped: whether blanks at both ends are left out. system:
    the system prompt of the conversation that it is.
    """

    ids: Sequence[int]
    question: Sequence[int] | None = None
    stop: tuple[str, ...] = ()
    stripped: bool = False
    system: str = ""


def text_prompt(model: MemoryModel, text: str | Sequence[int]) -> Prompt:
    """Return the prompt of a text, or of token ids, as they stand."""
    if not isinstance(text, str):
        return Prompt(model.ids(list(text)))
    begin = begin_of(model.tokenizer)
    return Prompt([*([] if begin is None else [begin]), *model.ids(text)])


def conversation_prompt(model: MemoryModel, history: History) -> Prompt:
    """Return the prompt of a conversation that no session has."""
    ids, style = prompt_of(model, history)
    return Prompt(ids, model.ids(history.said), (style.stop,), stripped=True, system=history.system)


def complete(
    model: MemoryModel,
    client: kvbank.Client,
    turn: Turn,
    *,
    prompt: Prompt,
    decoding: Decoding,
    on_text: Callable[[str], None],
) -> Reply:
    """Go on with a prompt. What of it leaves the window is remembered in chunks that are deleted afterwards.

    on_text: called with pieces of the text as they come. Raises what the model and the service raise, and Left.
    """
    client.server_info(timeout=START_S)  # who may not use the service may not use the model either
    shown = StopTexts((*prompt.stop, *decoding.stop), on_text, stripped=prompt.stripped)
    writing = _Writing(model, shown, turn)
    drawn = {"temperature": decoding.temperature} | decoding.generation()
    sampling = drawn if decoding.draws else dict.fromkeys(("temperature", "top_p"))
    needs_memory = len(prompt.ids) + decoding.max_new_tokens > model.window
    with _cache(model, client, needs_memory) as (cache, memory), turn.holding_model(decoding.seed):
        model.generate(
            prompt.ids,
            cache=cache,
            question=prompt.question,
            progress=turn.progress,
            step=turn.step,
            max_new_tokens=decoding.max_new_tokens,
            do_sample=decoding.draws,
            streamer=writing,
            stopping_criteria=[writing.stopped],
            **sampling,
        )
        written = 0 if memory is None else memory.stats.tokens
    usage = Usage(prompt=len(prompt.ids), completion=len(writing.ids), written=written)
    return Reply(shown.text, turn.left or not (shown.found or writing.ended), usage, turn.left, prompt.system)


@contextmanager
def _cache(
    model: MemoryModel, client: kvbank.Client, needs_memory: bool
) -> Iterator[tuple[MemoryCache, Memory | None]]:
    """Yield a fresh window; one with a memory, which has nothing afterwards, where the text may leave it.

    All requests of a tenant share a bank, since a key that writes may make a bank and not delete it; each recalls its
    own chunks alone.
    """
    if not needs_memory:
        yield model.cache(memory=False), None
        return
    own = {"request": uuid.uuid4().hex}
    _make_bank(model, client)
    memory = model.with_bank(_bank(model), client=client, strict=True, metadata=own)
    memory.spool, memory.filter = None, kvbank.Filter(metadata=own)
    try:
        yield model.cache(memory), memory
    finally:
        chunks = client.list_chunks(_bank(model), filter=memory.filter)
        ids = [chunk.chunk_id for chunk in chunks]  # all, before one goes: pages are read by what is there
        for first in range(0, len(ids), _MOST_IDS):
            client.delete_chunks(_bank(model), ids[first : first + _MOST_IDS])


def _make_bank(model: MemoryModel, client: kvbank.Client) -> None:
    """Make the bank for requests without a session, whose chunks go by themselves where a worker dies before that."""
    kv = kv_spec(model.attachment, model.settings.store_dtype)
    spec = kvbank.EmbeddingSpec(model.memory.embedder.digest, model.memory.embedder.dimension)
    with suppress(kvbank.AlreadyExists):
        client.create_bank(_bank(model), kv=kv, embedding=spec, exist_ok=True, expiry=_LONGEST)


def _bank(model: MemoryModel) -> str:
    """Return the name of the bank for requests without a session to this model, as it is embedded and stored here."""
    made = f"{model.attachment.reader.digest} {model.memory.embedder.digest} {model.attachment.plan.memory_layers}"
    return f"requests-{hashlib.sha256(made.encode()).hexdigest()[:16]}"


class _Writing:
    """Follows a text while `generate` writes it: a streamer and a stopping criterion.

    ids: the tokens of the text. ended: the model has ended the text itself.
    """

    def __init__(self, model: MemoryModel, shown: StopTexts, turn: Turn) -> None:
        self._tokenizer, self._shown, self._turn = model.tokenizer, shown, turn
        named = (model.model.generation_config.eos_token_id, model.tokenizer.eos_token_id)
        self._ends = {int(token) for ids in named for token in _listed(ids)}
        self._begun, self._told = False, 0
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        """Take tokens as they are written; the first call hands over the prompt."""
        if not self._begun:
            self._begun = True
            return
        for token in value.reshape(-1).tolist():
            if token in self._ends:
                self.ended = True
            else:
                self.ids.append(token)
        self._show(last=False)

    def end(self) -> None:
        """Show the rest of the text."""
        self._show(last=True)
        self._shown.end()

    def stopped(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Tell `generate` whether the text ends here."""
        done = self._turn.left or self._shown.found
        return torch.full((1,), done, device=input_ids.device)

    def _show(self, last: bool) -> None:
        text = str(self._tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        text = text if last else text.rstrip("\ufffd")
        if len(text) > self._told:
            self._shown.take(text[self._told :])
            self._told = len(text)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
