"""What a session begins with: its system prompt, which stays in front of it for good, its bank, its log's first line.

This file owns two rules. What a session begins with is fixed then: a window that is made again has the same sinks. And
a session never shares a bank: a bank of a name that was asked for is made by the session, since it is deleted with the
session, and has the history of that session alone.
"""

import contextlib
from dataclasses import dataclass

import kvbank
from model_worker.errors import InputError, SessionError
from model_worker.model import MemoryModel
from model_worker.remember.service_link import START_S
from model_worker.session.epoch import KEY, known_epochs
from model_worker.session.log import SessionLog
from model_worker.session.log_format import Header, is_named
from model_worker.session.prompt import PromptFormat, prompt_format
from model_worker.user_text import encode_between, readable
from model_worker.window.placement import Room
from model_worker.window.sinks import sinks_of
from model_worker.window.tova import TovaRule

_LONGEST_NAME = 200  # of a bank, in characters


@dataclass(frozen=True, slots=True)
class Asked:
    """What a session is asked to begin with, and what one that was begun is asked to have.

    system: a system prompt, bank: the name of the session's bank; None for what the session was begun with, or none of
    one's own choice. embed, adapter: how the model's embedder and its adapter are called, which is noted in a new log.
    """

    system: str | None = None
    bank: str | None = None
    embed: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Beginning:
    """The beginning of the session of `log` with `model`. style: see `prompt_format`. system: its system prompt."""

    model: MemoryModel
    log: SessionLog
    style: PromptFormat
    system: str
    asked: Asked

    @classmethod
    def of(cls, model: MemoryModel, log: SessionLog, style: str, asked: Asked) -> "Beginning":
        """Return the beginning of a new session, or of the one that `log` has.

        Raises SessionError for another system prompt or bank than the session was begun with, for a bank that is there
        before the session, and for the session of another model; InputError for a name that is none of a bank.
        """
        system, header = asked.system, log.header
        said = "" if system is None else readable(system).strip()
        _check_bank(model.client, header, asked.bank)
        if header is not None:
            _check_model(model, header, asked.adapter)
            if system is not None and said != header.system:
                was = f"with {header.system!r}" if header.system else "without a system prompt"
                raise SessionError(f"session {header.name!r} was begun {was}, and keeps that; begin another session")
            said = header.system
        return cls(model, log, prompt_format(style, model.tokenizer, model.model.config, bool(said)), said, asked)

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
        fields |= {"embed": self.asked.embed, "adapter": self.asked.adapter}
        fields |= {} if self.asked.bank is None else {"bank": self.asked.bank}
        return self.log.header or self.log.begin(model=name, chunk=model.chunk, sinks=sinks, **fields)

    def bank_is_gone(self, header: Header) -> bool:
        """Tell whether the service has no bank of this session.

        Raises SessionError for a bank that only has its name, at a service that the session was moved to: a session's
        bank has an epoch from the session's first start on. Of the names that sessions make, with a part of their uid,
        there is no second bank.
        """
        try:
            bank = self.model.client.get_bank(header.bank, timeout=START_S)
        except kvbank.BankNotFound:
            return True
        if is_named(header) and KEY not in bank.metadata and known_epochs(self.log.epoch):
            raise SessionError(f"bank {header.bank!r} of this service is not that of session {header.name!r}")
        return False


def _check_model(model: MemoryModel, header: Header, adapter: str) -> None:
    """Raise SessionError where a session was begun with another model, or with another adapter than `adapter`."""
    digest = model.attachment.reader.digest
    if header.reader == digest:
        return
    was, this = header.model, "another"
    if header.adapter != adapter:
        was += f" and {_called(header.adapter)}"
        this = f"with {_called(adapter)}"
    raise SessionError(
        f"session {header.name!r} was begun with model {was} (reader {header.reader}), this one is {this} "
        f"(reader {digest})"
    )


def _called(adapter: str) -> str:
    return f"adapter {adapter}" if adapter else "no adapter"


def _check_bank(client: kvbank.Client, header: Header | None, name: str | None) -> None:
    """Check the name that is asked for the bank of a session. Raises SessionError and InputError."""
    if name is None:
        return
    if (
        not isinstance(name, str)
        or not 1 <= len(name) <= _LONGEST_NAME
        or not name.isprintable()
        or name.strip() != name
    ):
        raise InputError(f"bank {name!r}: 1 to {_LONGEST_NAME} printable characters, without blanks at the ends")
    if header is not None:
        if name != header.bank:
            raise SessionError(f"session {header.name!r} has bank {header.bank!r} of its own, and keeps it")
        return
    with contextlib.suppress(kvbank.BankNotFound):
        client.get_bank(name, timeout=START_S)
        raise SessionError(
            f"bank {name!r} is there already; a session makes its bank, which has that session's history alone and is "
            "deleted with it: choose another name"
        )
