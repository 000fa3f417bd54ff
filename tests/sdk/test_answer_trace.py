"""Why an answer came, as the metadata of its turn have it."""

import json

import pytest

import kvbank

STEPS = (kvbank.AnswerStep("prompt", 'who is "Ann" 你?', True, 0, 7), kvbank.AnswerStep("answer", "", False, 7, 3))
CHUNKS = (
    kvbank.AnswerChunk("notes", 3, 16, 8, 0.5, (1, 0), (0.25, 0.5)),
    kvbank.AnswerChunk("", 0, -1, 0, None, (0,), (0.125, 0.0)),
)
TRACE = kvbank.AnswerTrace((2, 5), STEPS, CHUNKS, 1, (0.0, 0.25), (0.625, 0.25), (0.0, 0.0), 4)


def test_a_turn_has_the_trace_that_its_metadata_say() -> None:
    assert kvbank.Turn(metadata=TRACE.metadata).trace == TRACE
    assert kvbank.Turn().trace is None
    assert (CHUNKS[0].share, CHUNKS[0].total) == (0.375, 0.75)


def test_masses_are_kept_in_five_decimals() -> None:
    third = kvbank.AnswerTrace((2,), STEPS, (), 0, (1 / 3,), (2 / 3,), (0.0,), 1)
    assert '"rest":[0.33333]' in third.to_json()


def changed(**fields: object) -> str:
    return json.dumps({**json.loads(TRACE.to_json()), **fields})


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "null", "[" * 16_000, "{}"),
        changed(layers=None),
        changed(window=["a"]),
        changed(tokens=float("nan")),
        changed(chunks=[{"bank": "notes"}]),
        changed(steps=[]),  # of which the chunks name two
        changed(left_out="1e999"),
    ],
)
def test_what_is_no_trace_is_none(text: str) -> None:
    assert kvbank.Turn(metadata={"trace": text}).trace is None
