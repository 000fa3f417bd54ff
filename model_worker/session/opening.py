"""Which session a worker goes on with: one that the service has, or one that is begun."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import kvbank
from kvbank.wire.scalars import Scalar
from model_worker.arguments import whole, words
from model_worker.embed import Embedder
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.remember.opening import readable_bank
from model_worker.remember.settings import MemoryOptions, MemorySettings, check_names
from model_worker.session.beginning import Asked, Beginning
from model_worker.session.record import SessionRecord
from model_worker.user_text import readable
from model_worker.window.placement import Room
from model_worker.window.tova import TovaRule

# Settings of its memory that a session decides itself.
_OWN = ("chunk", "source", "spool")


class SessionOptions(MemoryOptions, total=False):
    """What a session is opened with besides its model and its window: what it begins with, and settings of its memory.

    create: whether a session that is not there is begun. holder: what this worker calls itself; None is the machine,
    the process and a random word. system: stands before the first turn, as the chat template has it; its tokens stay
    for good, as sinks do. bank: the name of the bank that has the session's chunks, which is made if it is not there. A
    session keeps both as it was begun; None: those, or no system prompt, and a bank that is called by the session.
    reads: banks that it reads besides its own, with K-V of the same model, from now on; None: those that it reads.
    metadata, ttl: of a new session, as in `client.sessions.create`. model_name, embed, adapter: how the model,
    its embedder and its adapter's folder are called, which a new session notes, so that the next worker can make the
    same. why: of so many tokens of an answer one is looked at, and what it attended to is kept with the turn
    (`Turn.trace`); by default 0: nothing is kept. All others are fields of `MemorySettings` in which the session's
    memory differs from the model's.
    """

    create: bool
    holder: str | None
    system: str | None
    bank: str | None
    reads: Sequence[str] | None
    metadata: Mapping[str, Scalar] | None
    ttl: timedelta | None
    model_name: str
    embed: str
    adapter: str
    why: int


def parted(model: MemoryModel, options: SessionOptions) -> tuple[Asked, MemoryOptions]:
    """Return what a session is asked to begin with, and the settings of its memory.

    Raises InputError for names that are no settings, for settings that a session decides itself, and for a model that
    reads its memory again.
    """
    given: dict[str, Any] = dict(options)
    names = ("create", "holder", "system", "bank", "reads", "metadata", "ttl", "model_name", "embed", "adapter", "why")
    asked = {name: given.pop(name) for name in names if name in given}
    system, metadata = asked.get("system"), asked.get("metadata")
    if asked.get("reads") is not None:
        asked["reads"] = tuple(words("reads", asked["reads"]))
    if system is not None and not isinstance(system, str):
        raise InputError(f"system is a string, not a {type(system).__name__}")
    whole("why", asked.get("why", 0), least=0)
    check_names(MemorySettings, given)
    if taken := [name for name in _OWN if name in given]:
        raise InputError(f"setting {taken[0]} cannot be given here: a session decides it itself")
    if model.settings.recall == "reread":
        raise InputError('a session attends to its memory; recall="reread" is for generate')
    return Asked(**{**asked, "metadata": metadata or {}}), cast(MemoryOptions, given)


@dataclass(frozen=True, slots=True)
class Opening:
    """How a worker opens a session. style: see `prompt_format`. room, local: of the window. embedder: of the memory."""

    model: MemoryModel
    client: kvbank.Client
    style: str
    asked: Asked
    room: Room
    local: TovaRule | None
    embedder: Embedder

    def found_or_begun(self, name: str | None, session_id: str | None) -> tuple[Beginning, kvbank.Session]:
        """Return a session of the service, and how it began; one that is not there is begun where that is asked for.

        name, session_id: which session; with neither of them one without a name is begun. Raises
        kvbank.SessionNotFound, SessionError, BankMismatch and InputError as `Session.open` does.
        """
        known = self._found(name, session_id)
        for bank in self.asked.reads or ():
            readable_bank(self.client, bank, self.model.attachment, self.embedder)
        if known is None:
            beginning = Beginning.of_new(self.model, self.style, self.asked, self.room, self.local)
            if self.asked.bank is not None:  # the service wants a bank that is there
                self.model.with_bank(self.asked.bank, client=self.client)
            try:
                return beginning, self._begun(name or "", beginning)
            except kvbank.SessionExists:  # another worker was quicker
                known = self.client.sessions.get(name=name)
        beginning = Beginning.of_known(self.model, self.style, self.asked, self.room, self.local, known)
        if self.asked.reads not in (None, known.reads):
            known = self.client.sessions.update(known.session_id, reads=self.asked.reads)
        return beginning, known

    def begun_anew(self, beginning: Beginning, record: SessionRecord) -> Beginning:
        """Return how a session without turns begins: with the system prompt that is asked for now, if there is one.

        beginning: as it was begun. record: of the session, whose lease is held.
        """
        system = None if self.asked.system is None else readable(self.asked.system).strip()
        if system in (None, beginning.begun_with.system):
            return beginning
        other = Beginning.of_new(self.model, self.style, self.asked, self.room, self.local)
        record.set(**{"system": "", **other.begun_with.settings})
        return other

    def _found(self, name: str | None, session_id: str | None) -> kvbank.Session | None:
        if session_id is not None:
            return self.client.sessions.get(session_id)
        if not name and self.asked.create:
            return None
        try:
            return self.client.sessions.get(name=name)
        except kvbank.SessionNotFound:
            if not self.asked.create:
                raise
            return None

    def _begun(self, name: str, beginning: Beginning) -> kvbank.Session:
        return self.client.sessions.create(
            name=name,
            bank=self.asked.bank or "",
            reads=self.asked.reads or (),
            reader_digest=self.model.attachment.reader.digest,
            settings=beginning.begun_with.settings,
            metadata=cast(Mapping[str, str], self.asked.metadata),
            ttl=self.asked.ttl,
        )
