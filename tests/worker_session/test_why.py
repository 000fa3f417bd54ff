"""A session says why it gave an answer: what its turns recalled from its own bank, and how that was attended to."""

from pathlib import Path

import pytest

from model_worker.model import MemoryModel
from model_worker.session.log import SessionLog
from model_worker.session.session import Session


def test_the_trace_of_a_turn(model_folder: Path, address: str, tmp_path: Path) -> None:
    """Trace the third turn of a session, whose first one has left the window, again after a restart."""
    with MemoryModel.from_pretrained(model_folder, memory=address, bank=(), chunk=16, window=48, top_k=2) as model:
        for restarted in (False, True):
            with Session.open(model, SessionLog.open(tmp_path, "one"), style="plain") as session:
                if not restarted:
                    session.say("the captain is Ilse Brandt", max_new_tokens=20)
                    session.say("and nothing else has happened", max_new_tokens=20)
                with session.trace() as recorder:
                    turn = session.say("who is captain?", max_new_tokens=20)
                trace = recorder.trace()
            assert trace.steps[0].query == "who is captain?"
            assert trace.steps[-1].kind == "answer"
            assert {step.query for step in trace.steps if step.kind == "prompt"} == {"who is captain?"}
            assert all(chunk.metadata["session"] == "one" for chunk in trace.chunks)
            assert any("capta" in chunk.text for chunk in trace.chunks)
            answer = len(turn.ids) - turn.prompt
            assert trace.tokens == 1 + answer
            assert sum(step.tokens for step in trace.steps) == len(turn.ids)
            assert trace.offset == sum(len(old.ids) for old in session.log.turns) - answer
            for masses in zip(trace.window, trace.sinks, *(chunk.mass for chunk in trace.chunks), strict=True):
                assert sum(masses) == pytest.approx(1, abs=1e-6)
