"""How tests hold conversations: sessions of a tiny model, what was said in them, and what must be in their banks."""

from itertools import accumulate
from typing import Any

import torch

import kvbank
from model_worker.session.session import Session

CHUNK, WINDOW, ANSWER = 16, 48, 6
WORDS = ["the sea is wide", "ships come and go", "what did I say of the sea?", "and who sails the ships?"]


def say(session: Session, *texts: str, **options: Any) -> list[kvbank.Turn]:
    return [session.say(text, **{"max_new_tokens": ANSWER, **options}) for text in texts]


def ids(turns: list[kvbank.Turn]) -> list[int]:
    return [token for turn in turns for token in turn.token_ids]


def texts(session: Session) -> list[str]:
    """Return what the user said in the turns of a session that are not parts of a message."""
    return [turn.text("user") for turn in session.turns if turn.status not in ("part", "forgotten")]


def next_logits(session: Session) -> torch.Tensor:
    """Return what the model expects after one more token; the session is not to be used after that."""
    with torch.no_grad():
        return session.model.model(input_ids=torch.tensor([[70]]), past_key_values=session.window.cache).logits[0, -1]


def own_chunks(session: Session) -> list[kvbank.Chunk]:
    """Return the chunks of a session, in the order of their offsets."""
    listed = session.record.client.list_chunks(session.info.bank, filter=session.info.filter)
    return sorted(listed, key=lambda chunk: chunk.start)


def said_at(session: Session) -> dict[int, int]:
    """Return the tokens of a session by their offsets, without those of forgotten turns."""
    return {turn.start + at: token for turn in session.turns for at, token in enumerate(turn.token_ids)}


def check_bank(session: Session, *, ahead: bool = False) -> None:
    """Check that all that left the window is in the bank, once, and nothing else, and that chunks end where turns do.

    ahead: the bank may have more of what was said, which is in the window too.
    """
    said, chunks = said_at(session), own_chunks(session)
    places = [chunk.start + at for chunk in chunks for at in range(len(chunk.token_ids))]
    assert len(places) == len(set(places)), "a token is in the bank twice"
    left = {at for at in said if at < session.left}
    assert set(places) == left or (ahead and left < set(places) <= said.keys())
    assert [token for chunk in chunks for token in chunk.token_ids] == [said[at] for at in places]
    ends = set(accumulate(turn.token_count for turn in session.turns))
    turns = {turn.number: turn for turn in session.turns}
    for chunk in chunks:
        length, after = len(chunk.token_ids), chunk.start + len(chunk.token_ids)
        assert after in ends or length == CHUNK or (length >= CHUNK // 2 and chunk.text[-1] in ".!?\n")
        assert not any(chunk.start < end < after for end in ends), "a chunk has parts of two turns"
        turn = turns[int(chunk.metadata["turn"])]
        assert turn.start <= chunk.start < after <= turn.start + turn.token_count
        answer = turn.start + turn.prompt_tokens
        role = "user" if after <= answer else "assistant" if chunk.start >= answer else "user+assistant"
        assert chunk.metadata["role"] == role
    assert session.window.cache.columns.ids[0].tolist() == [said[at] for at in sorted(said) if at >= session.left]
