"""What the tools answer, as models and programs read it: each field says what it is."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

import kvbank


class Passage(BaseModel):
    """A passage of the memory."""

    chunk_id: int = Field(description="By which forget and explain know it.")
    text: str
    source: str = Field(description="The document that it is of; empty for none.")
    metadata: dict[str, str | int | float | bool] = Field(description="What else was noted with it.")
    written: datetime = Field(description="When it was remembered.")
    recalled: int = Field(description="How often it was recalled.")

    @classmethod
    def of(cls, chunk: kvbank.Chunk) -> "Passage":
        """Return a chunk of a bank as a passage."""
        return cls(**_fields_of(chunk))


class Found(Passage):
    """A passage that was found."""

    score: float = Field(description="How near it is to what was asked; higher is nearer, 1 is the same wording.")

    @classmethod
    def of_hit(cls, hit: "kvbank.TextFound") -> "Found":
        """Return a hit of a search as a passage with its score."""
        return cls(**_fields_of(hit.chunk), score=hit.score)


def _fields_of(chunk: kvbank.Chunk) -> dict[str, Any]:
    metadata = dict(chunk.metadata)
    source = str(metadata.pop("source", ""))
    names = {"chunk_id": chunk.chunk_id, "text": chunk.text, "source": source, "metadata": metadata}
    return {**names, "written": chunk.create_time, "recalled": chunk.retrieval_count}


class Remembered(BaseModel):
    """What has become of a text that was to be remembered."""

    bank: str
    chunk_ids: list[int] = Field(description="Its passages, in order.")
    written: int = Field(description="Passages that are new.")
    known: int = Field(description="Passages that were remembered before; they are not stored twice.")


class Recalled(BaseModel):
    """The passages that were found for a question."""

    bank: str
    passages: list[Found] = Field(description="The nearest first; empty where nothing is known.")


class Forgotten(BaseModel):
    """How much of a bank was forgotten."""

    bank: str
    forgotten: int = Field(description="How many passages are gone.")
    receipt: str = Field(description="Id of the receipt; empty where there was nothing to forget.")


class SessionShown(BaseModel):
    """A conversation that the memory service keeps."""

    session_id: str
    name: str = Field(description="Empty for one that is only known by its id.")
    turns: int
    tokens: int
    bank: str = Field(description="The bank that has what left its window.")
    metadata: dict[str, str]
    created: datetime
    changed: datetime = Field(description="When its last turn was said.")
    held_by: str = Field(description="The worker that has it now; empty for none.")

    @classmethod
    def of(cls, session: kvbank.Session) -> "SessionShown":
        """Return a session as it is shown."""
        return cls(
            session_id=session.session_id,
            name=session.name,
            turns=session.head,
            tokens=session.tokens,
            bank=session.bank,
            metadata=dict(session.metadata),
            created=session.create_time,
            changed=session.update_time,
            held_by=session.lease.holder if session.lease else "",
        )


class Sessions(BaseModel):
    """Conversations, the last changed first."""

    sessions: list[SessionShown]
    more: bool = Field(description="Whether there are more than these.")


class Reason(BaseModel):
    """Why a passage was found."""

    passage: Found
    found_by: str = Field(description="The embedder that compared the texts.")
    shared_words: dict[str, float] = Field(
        description="What words of the question add to the score; empty where the embedder goes by meaning."
    )
    age_seconds: float = Field(description="How long ago it was remembered.")


class AnswerReason(BaseModel):
    """Why an answer of a conversation came: what the model attended to, as its worker kept it."""

    session: str
    turn: int
    question: str
    answer: str
    trace: dict[str, Any] = Field(
        description="The recalled chunks: the question that found each, its score, its attention by layer."
    )
    passages: list[Passage] = Field(description="The recalled chunks that are still there, with their texts.")


class Explained(BaseModel):
    """The reasons of passages for a question, or of an answer in a conversation."""

    passages: list[Reason] = []
    answer: AnswerReason | None = None
