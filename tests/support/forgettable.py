"""A conversation that can be recognised byte by byte, for tests that look for what was forgotten in raw files."""

import base64
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvbank.v1 import bank_pb2, chunk_pb2, session_pb2
from tests.support.caller import EMBEDDER, Caller
from tests.support.sessions import SessionCaller, turn

DIMENSION = 32
TOKENS = 12
# Words that no file has by chance.
_WORDS = 6


@dataclass
class Secret:
    """What is said in one turn, or stands in one document, and the chunk that is made of it."""

    number: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    vector: Any = None
    tensors: bytes = b""

    @classmethod
    def made(cls, number: int) -> "Secret":
        """Make a secret that no other number has."""
        rng = random.Random(number)
        words = [f"{number}-{rng.getrandbits(64):016x}" for _ in range(_WORDS)]
        tokens = [rng.randrange(1 << 20, 1 << 30) for _ in range(TOKENS)]
        return cls(number, " ".join(words), tokens, np.random.default_rng(number).standard_normal(DIMENSION))

    @property
    def needles(self) -> dict[str, bytes]:
        """Return bytes by which the secret is recognised, in each form in which something may keep it."""
        ids, vector = np.asarray(self.tokens, "<u4").tobytes(), self.vector.astype("<f4")
        found = {"text": self.text.encode(), "a word": self.text.split()[2].encode(), "token ids": ids[8:28]}
        found |= {"varints": session_pb2.Turn(token_ids=self.tokens[2:6]).SerializeToString()[2:]}
        found |= {"vector": vector.tobytes()[16:48], "half of the vector": vector.astype("<f2").tobytes()[16:48]}
        found |= {"ids as base64": base64.b64encode(ids)[:-4], "vector as base64": base64.b64encode(vector)[:-4]}
        if self.tensors:
            found |= {"k": self.tensors[:32], "last v": self.tensors[-60:-28]}
        return found


def bank_of(caller: Caller, name: str, **fields: Any) -> bank_pb2.Bank:
    """Make a bank for the chunks of secrets."""
    embedding = bank_pb2.EmbeddingSpec(embedder_digest=EMBEDDER, dimension=DIMENSION)
    return caller.create(name, embedding=embedding, **fields)


def chunk_of(
    caller: Caller, secret: Secret, start: int, context: str = "isolated", **metadata: str
) -> tuple[chunk_pb2.Chunk, bytes]:
    """Make the chunk of a secret, of random tensors, which the secret then knows."""
    chunk, secret.tensors = caller.chunk(
        secret.vector, start=start, original_length=TOKENS, token_ids=secret.tokens, text=secret.text
    )
    chunk.ClearField("metadata")
    chunk.metadata.update(metadata)
    chunk.payload.producer.context = context
    return chunk, secret.tensors


def said(secret: Secret) -> session_pb2.Turn:
    """Make the turn of a secret, which has the secret in all its fields."""
    word = secret.text.split()[2]
    return turn(secret.text, secret.tokens, key=f"key-{word}"[:64], metadata={"trace": word}, usage={word: 3})


@dataclass
class Talk:
    """A session whose turns are secrets, with a chunk for each in its bank."""

    caller: Caller
    sessions: SessionCaller
    session_id: str
    epoch: int
    secrets: list[Secret]
    ids: list[int]

    @classmethod
    def begun(cls, caller: Caller, first: int, count: int, **fields: Any) -> "Talk":
        """Begin a session of so many turns; the secret of the first has the number `first`."""
        sessions = SessionCaller(caller.channel)
        session = sessions.create(**fields)
        talk = cls(caller, sessions, session.session_id, sessions.acquire(session.session_id, ttl=600).epoch, [], [])
        if not fields.get("bank"):
            bank_of(caller, session.bank)
        for number in range(first, first + count):
            talk.say(Secret.made(number))
        return talk

    @property
    def bank(self) -> str:
        """Return the name of the bank that has the chunks."""
        return self.sessions.get(self.session_id).bank

    def say(self, secret: Secret, context: str = "window") -> None:
        """Append the turn of a secret, and write its chunk."""
        session = self.sessions.append(self.session_id, self.epoch, len(self.secrets), said(secret)).session
        start = len(self.secrets) * TOKENS
        self.secrets.append(secret)
        branch = session.stretches[-1].branch
        chunk = chunk_of(self.caller, secret, start, context, branch=branch, turn=str(len(self.secrets)))
        self.ids.append(self.caller.write(chunk, bank=session.bank)[0].chunk_id)


def found_in(folder: Path, secrets: Iterable[Secret]) -> list[str]:
    """Look for secrets in all files below a folder, and tell where something of them is."""
    return [where for path in _files(folder) for where in _found(folder, path, list(secrets))]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _found(folder: Path, path: Path, secrets: list[Secret]) -> Iterator[str]:
    data = path.read_bytes()
    for secret in secrets:
        for form, needle in secret.needles.items():
            if needle in data:
                yield f"{form} of {secret.number} in {path.relative_to(folder)} at {data.index(needle)}"
