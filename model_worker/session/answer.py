"""An answer while it is written: when it ends, and what of it may be shown so far."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model_worker.arguments import whole
from model_worker.model import MemoryModel
from model_worker.session.prompt import PromptFormat, overlap


class AnswerEnd:
    """The end of one answer: the format's stop text, one of the caller's, one of the model's end tokens, or `stopped`.

    `generate` calls it as a stopping criterion, and its `printer` as a streamer; neither needs a base class for that.
    on_text: called with pieces of the answer as they come. stopped: asked at every token whether the answer ends there.
    stop: texts before which the answer ends. by_itself: whether the answer ended otherwise than by `stopped` or by its
    limit.
    """

    def __init__(
        self,
        model: MemoryModel,
        style: PromptFormat,
        on_text: Callable[[str], None] | None,
        stopped: Callable[[], bool],
        stop: Sequence[str] = (),
    ):
        self._tokenizer, self._style, self._stopped = model.tokenizer, style, stopped
        config = model.model.generation_config
        named = (config.eos_token_id, self._tokenizer.eos_token_id)
        ends = [x for ids in named for x in (ids if isinstance(ids, list) else [ids]) if x is not None]
        self.end_tokens = sorted({whole("an end token of the model's generation_config", x, least=0) for x in ends})
        self.pad = next((x for x in (self._tokenizer.pad_token_id, *self.end_tokens) if x is not None), 0)
        self.printer = _Printer(self, on_text)
        self._stops = [text for text in (style.stop, *stop) if text]
        self._asked = list(stop)
        self._length = max((len(text.encode()) for text in self._stops), default=0) + 1
        self.by_itself = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tail = self._tail(self.printer.ids, input_ids) if self._stops else ""
        self.by_itself = any(text in tail for text in self._stops) or int(input_ids[0, -1]) in self.end_tokens
        done = self._stopped() or (self.by_itself and int(input_ids[0, -1]) not in self.end_tokens)
        return torch.full((1,), done, device=input_ids.device)

    def _tail(self, before: list[int], input_ids: Tensor) -> str:
        """Return the end of the answer's text, with the newest token, which the streamer has not seen yet."""
        return decoded(self._tokenizer, [*before, int(input_ids[0, -1])][-self._length :])

    def cut(self, written: list[int]) -> list[int]:
        """Return an answer's tokens without an end token, and without a last token that goes on behind the stop text.

        The model was not fed either of these.
        """
        stop, text = self._style.stop, decoded(self._tokenizer, written)
        over = bool(stop) and stop in text and not text.endswith(stop)
        return written[:-1] if written and (written[-1] in self.end_tokens or over) else written

    def visible(self, ids: list[int], last: bool) -> str:
        """Return what may be shown of an answer so far.

        Left out are half a character, and what may turn out to be the stop text; with `last` there is no more to come.
        """
        text = self._style.answer(decoded(self._tokenizer, [x for x in ids if x not in self.end_tokens]))
        for stop in self._asked:
            text = text.partition(stop)[0]
        if last:
            return text
        begun = max((overlap(text, stop) for stop in self._asked), default=0)
        return text[: len(text) - begun].rstrip("\ufffd").rstrip()


class _Printer:
    """Shows an answer while `generate` writes it, and collects its tokens in `ids`."""

    def __init__(self, end: AnswerEnd, on_text: Callable[[str], None] | None):
        self.ids: list[int] = []
        self._end, self._on_text, self._shown, self._prompt = end, on_text, 0, True

    def put(self, value: Tensor) -> None:
        """Take tokens as `generate` writes them; the first call hands over the prompt."""
        if self._prompt:
            self._prompt = False
            return
        self.ids += value.reshape(-1).tolist()
        self._show(last=False)

    def end(self) -> None:
        """Show the rest of the answer."""
        self._show(last=True)

    def _show(self, last: bool) -> None:
        text = self._end.visible(self.ids, last)
        if self._on_text is not None and len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of `ids`, with special tokens and spaces as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
