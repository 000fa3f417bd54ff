"""A session whose recalls are asked for ahead: what an answer has asked for stays with that answer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from model_worker.model import MemoryModel
from model_worker.session.session import Session

from .conversing import CHUNK, WINDOW, WORDS, check_bank, ids, say

# Each answer of 6 tokens ends between the token at which its recall is asked for and the one for which that is due.
AHEAD = CHUNK - 4


@pytest.fixture(scope="module")
def model(model_folder: Path, address: str) -> Iterator[MemoryModel]:
    with MemoryModel.from_pretrained(str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW) as model:
        yield model


def asked(session: Session) -> list[tuple[str, ...]]:
    """Return the queries of each turn."""
    return [tuple(step.query for step in turn.trace.steps) for turn in session.turns if turn.trace is not None]


@pytest.mark.parametrize("then", ["it goes on", pytest.param("it is rewound", marks=pytest.mark.slow)])
def test_the_next_turn_recalls_for_itself(model: MemoryModel, sea: str, then: str) -> None:
    """Compare with a session that asks when a recall is due: queries, what they found, and all tokens."""
    seen = {}
    for ahead in (0, AHEAD):
        with Session.open(model, name=f"{sea}-{ahead}", ahead=ahead, why=1) as session:
            say(session, *WORDS[:3])
            if then == "it is rewound":
                session.rewind(2)
            say(session, *WORDS[2:])
            check_bank(session, ahead=then == "it is rewound")
            seen[ahead] = ids(session.turns), asked(session)
    assert seen[0] == seen[AHEAD]
    assert len(seen[0][1]) > 3


@pytest.mark.slow
def test_an_answer_that_recalls_is_the_same_when_it_is_written_again(model: MemoryModel, sea: str) -> None:
    """Write answers long enough for two recalls each, once in one session and once with a new start for each turn."""
    with Session.open(model, name=sea, ahead=AHEAD) as session:
        say(session, *WORDS[:3], max_new_tokens=2 * CHUNK + 4, min_new_tokens=2 * CHUNK + 4)
        whole = ids(session.turns)
        check_bank(session)
    for word in WORDS[:3]:
        with Session.open(model, name=f"{sea}-cut", ahead=AHEAD) as session:
            say(session, word, max_new_tokens=2 * CHUNK + 4, min_new_tokens=2 * CHUNK + 4)
            cut = ids(session.turns)
    assert cut == whole
