"""What a session begins with: its system prompt, which stays in front of it for good, its sinks, its model and bank.

This file owns the rule that what a session begins with is fixed then: a window that is made again has the same sinks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

import kvbank
from kvbank.wire.scalars import Scalar
from model_worker.errors import InputError, SessionError
from model_worker.model import MemoryModel
from model_worker.session.begun_with import BegunWith
from model_worker.session.prompt import PromptFormat, prompt_format
from model_worker.user_text import encode_between, readable
from model_worker.window.placement import Room
from model_worker.window.sinks import sinks_of
from model_worker.window.tova import TovaRule

_LONGEST_NAME = 200  # of a bank, in characters


@dataclass(frozen=True, slots=True)
class Asked:
    """What a session is asked to begin with, and what one that was begun is asked to have.

    Each field is described in `SessionOptions`.
    """

    create: bool = True
    holder: str | None = None
    system: str | None = None
    bank: str | None = None
    reads: tuple[str, ...] | None = None
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    ttl: timedelta | None = None
    model_name: str = ""
    embed: str = ""
    adapter: str = ""
    why: int = 0


@dataclass(frozen=True, slots=True)
class Beginning:
    """The beginning of a session with `model`. style: see `prompt_format`. begun_with: what stays as it is."""

    model: MemoryModel
    style: PromptFormat
    begun_with: BegunWith

    @classmethod
    def of_new(cls, model: MemoryModel, style: str, asked: Asked, room: Room, local: TovaRule | None) -> "Beginning":
        """Return the beginning of a new session. room, local: of its window.

        The session's sinks are the model's, and at least the system prompt whole. Raises InputError where the local
        rule or the length of training has no room for them, and for a name that is none of a bank.
        """
        _check_bank_name(asked.bank)
        system = "" if asked.system is None else readable(asked.system).strip()
        form = prompt_format(style, model.tokenizer, model.model.config, bool(system))
        sinks = sinks_of(model.settings.sinks, model.attachment, room.window, local, room.left)
        made = BegunWith(model.chunk, asked.model_name, sinks, system, asked.embed, asked.adapter)
        found = cls(model, form, made)
        if system:
            sinks = sinks_of(max(sinks, len(found.ids)), model.attachment, room.window, local)
            found = cls(model, form, replace(made, sinks=sinks))
        found.check_sinks(room)
        return found

    @classmethod
    def of_known(
        cls, model: MemoryModel, style: str, asked: Asked, room: Room, local: TovaRule | None, known: kvbank.Session
    ) -> "Beginning":
        """Return the beginning of a session that was begun.

        A session without turns may get another system prompt (see `Opening.begun_anew`). Raises SessionError for
        another model, bank or system prompt than the session was begun with, InputError where the local rule or the
        length of training has no room for its sinks.
        """
        begun = BegunWith.of(known.settings, known.name or known.session_id)
        _check_model(model, known, begun, asked.adapter)
        called = known.name or known.session_id
        if asked.bank not in (None, known.bank):
            raise SessionError(f"session {called!r} has bank {known.bank!r}, and keeps it")
        if asked.system is not None and known.head and readable(asked.system).strip() != begun.system:
            was = f"with {begun.system!r}" if begun.system else "without a system prompt"
            raise SessionError(f"session {called!r} was begun {was}, and keeps that; begin another session")
        form = prompt_format(style, model.tokenizer, model.model.config, bool(begun.system))
        sinks_of(begun.sinks, model.attachment, room.window, local)
        found = cls(model, form, begun)
        found.check_sinks(room)
        return found

    @property
    def ids(self) -> list[int]:
        """Return the tokens before the first turn: the tokenizer's beginning, and the system prompt."""
        tokenizer, ids = self.model.tokenizer, list[int]()
        if self.style.begin:
            first = tokenizer.encode("a")[:1]
            ids += first if first == [tokenizer.bos_token_id] else []
        if self.begun_with.system:
            before, behind = self.style.system
            ids += encode_between(tokenizer, before, self.begun_with.system, behind)
        return ids

    def check_sinks(self, room: Room) -> None:
        """Raise InputError where window, memory and sinks do not stand within the length of training."""
        if self.begun_with.sinks:
            room.check(self.begun_with.sinks)


def _check_model(model: MemoryModel, known: kvbank.Session, begun: BegunWith, adapter: str) -> None:
    """Raise SessionError where a session was begun with another model, or with another adapter than `adapter`."""
    digest = model.attachment.reader.digest
    if known.reader_digest == digest:
        return
    was, this = begun.model, "another"
    if begun.adapter != adapter:
        was += f" and {_called(begun.adapter)}"
        this = f"with {_called(adapter)}"
    raise SessionError(
        f"session {known.name or known.session_id!r} was begun with model {was} (reader {known.reader_digest}), this "
        f"one is {this} (reader {digest})"
    )


def _called(adapter: str) -> str:
    return f"adapter {adapter}" if adapter else "no adapter"


def _check_bank_name(name: str | None) -> None:
    """Raise InputError for what cannot be the name of a bank."""
    if name is not None and (
        not isinstance(name, str)
        or not 1 <= len(name) <= _LONGEST_NAME
        or not name.isprintable()
        or name.strip() != name
    ):
        raise InputError(f"bank {name!r}: 1 to {_LONGEST_NAME} printable characters, without blanks at the ends")
