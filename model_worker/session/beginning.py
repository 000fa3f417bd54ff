"""What a session begins with: its system prompt, which stays in front of it for good, and its first line in the log.

This file owns the rule that both are fixed when the session begins: a window that is made again has the same sinks.
"""

from dataclasses import dataclass

from model_worker.errors import SessionError
from model_worker.model import MemoryModel
from model_worker.session.log import SessionLog
from model_worker.session.log_format import Header
from model_worker.session.prompt import PromptFormat, prompt_format
from model_worker.user_text import encode_between, readable
from model_worker.window.placement import Room
from model_worker.window.sinks import sinks_of
from model_worker.window.tova import TovaRule


@dataclass(frozen=True, slots=True)
class Beginning:
    """The beginning of the session of `log` with `model`. style: see `prompt_format`. system: its system prompt."""

    model: MemoryModel
    log: SessionLog
    style: PromptFormat
    system: str

    @classmethod
    def of(cls, model: MemoryModel, log: SessionLog, style: str, system: str | None) -> "Beginning":
        """Return the beginning of a new session, or of the one that `log` has.

        system: what is asked for; None for what the session was begun with. Raises SessionError for another one, and
        for the session of another model.
        """
        said, header = "" if system is None else readable(system).strip(), log.header
        if header is not None:
            _check_model(model, header)
            if system is not None and said != header.system:
                was = f"with {header.system!r}" if header.system else "without a system prompt"
                raise SessionError(f"session {header.name!r} was begun {was}, and keeps that; begin another session")
            said = header.system
        return cls(model, log, prompt_format(style, model.tokenizer, model.model.config, bool(said)), said)

    @property
    def ids(self) -> list[int]:
        """Return the tokens before the first turn: the tokenizer's beginning, and the system prompt."""
        tokenizer, ids = self.model.tokenizer, list[int]()
        if self.style.begin:
            first = tokenizer.encode("a")[:1]
            ids += first if first == [tokenizer.bos_token_id] else []
        if self.system:
            before, behind = self.style.system
            ids += encode_between(tokenizer, before, self.system, behind)
        return ids

    def sinks(self, window: int, local: TovaRule | None, room: Room) -> int:
        """Return how many sinks the session has: the model's, and at least the system prompt whole.

        window, local, room: of the session. Raises InputError where the local rule or the length of training has no
        room for them.
        """
        asked = self.model.settings.sinks if self.log.header is None else self.log.header.sinks
        sinks = sinks_of(asked, self.model.attachment, window, local, room.left)
        if self.log.header is None and self.system:
            sinks = sinks_of(max(sinks, len(self.ids)), self.model.attachment, window, local)
        if sinks:
            room.check(sinks)
        return sinks

    def header(self, name: str, target: str, sinks: int) -> Header:
        """Return the header of the log, which is begun if it is new. name, target: how model and service are called."""
        model, reader = self.model, self.model.attachment.reader.digest
        fields = {"reader": reader, "memory": target, "system": self.system}
        return self.log.header or self.log.begin(model=name, chunk=model.chunk, sinks=sinks, **fields)


def _check_model(model: MemoryModel, header: Header) -> None:
    """Raise SessionError where a session was begun with another model."""
    digest = model.attachment.reader.digest
    if header.reader != digest:
        raise SessionError(
            f"session {header.name!r} was begun with model {header.model} (reader {header.reader}), this one is "
            f"another (reader {digest})"
        )
