"""A session says why it gave an answer: what its turns recalled from its own bank, and how that was attended to."""

from pathlib import Path

import pytest

from model_worker.model import MemoryModel
from model_worker.session.explained import explained
from model_worker.session.session import Session


def test_the_trace_of_a_turn(model_folder: Path, address: str, sea: str) -> None:
    """Trace the third turn of a session, whose first one has left the window, again after a restart."""
    with MemoryModel.from_pretrained(model_folder, memory=address, bank=(), chunk=16, window=48, top_k=4) as model:
        for restarted in (False, True):
            with Session.open(model, name=sea, style="plain") as session:
                if not restarted:
                    session.say("the captain is Ilse Brandt", max_new_tokens=20)
                    session.say("and nothing else has happened", max_new_tokens=20)
                with session.trace() as recorder:
                    turn = session.say("who is captain?", max_new_tokens=20)
                trace = recorder.trace()
            assert trace.steps[0].query == "who is captain?"
            assert trace.steps[-1].kind == "answer"
            assert {step.query for step in trace.steps if step.kind == "prompt"} == {"who is captain?"}
            assert all(chunk.metadata["branch"] == session.info.stretches[0].branch for chunk in trace.chunks)
            found = "who is" if restarted else "capta"  # the same question stands in the bank by then
            assert any(found in chunk.text for chunk in trace.chunks)
            assert {chunk.metadata["turn"] for chunk in trace.chunks} <= {1, 2, 3}
            answer = len(turn.token_ids) - turn.prompt_tokens
            assert trace.tokens == 1 + answer
            assert sum(step.tokens for step in trace.steps) == len(turn.token_ids)
            assert trace.offset == session.info.tokens - answer
            for masses in zip(trace.window, trace.sinks, *(chunk.mass for chunk in trace.chunks), strict=True):
                assert sum(masses) == pytest.approx(1, abs=1e-6)


def test_a_turn_keeps_why_its_answer_came(model_folder: Path, address: str, sea: str) -> None:
    """Say the third turn of a session, whose first one has left the window, with a look at its answer."""
    with (
        MemoryModel.from_pretrained(model_folder, memory=address, bank=(), chunk=16, window=48, top_k=4) as model,
        Session.open(model, name=sea, style="plain", why=8, recent=1) as session,
    ):
        session.say("the captain is Ilse Brandt", max_new_tokens=20)
        session.say("and nothing else has happened", max_new_tokens=20)
        said = session.say("who is captain?", max_new_tokens=20)
        client, bank = session.record.client, session.info.bank
        turn = client.sessions.turn(said.key)
        trace = turn.trace
        assert trace is not None
        assert (trace.steps[0].kind, trace.steps[0].query) == ("prompt", "who is captain?")
        for masses in zip(trace.window, trace.sinks, trace.rest, *(chunk.mass for chunk in trace.chunks), strict=True):
            assert sum(masses) == pytest.approx(1, abs=1e-3)
        assert list(trace.chunks) == sorted(trace.chunks, key=lambda chunk: -chunk.total)
        found = explained(client, session.info, trace)
        assert [each.traced for each in found] == list(trace.chunks)
        assert any("capta" in each.stored.text for each in found if each.stored is not None)
        assert {each.stored is not None and each.stored.bank for each in found} == {bank}
        assert {each.traced.score is None for each in found} == {False, True}
        assert {0} <= {place for chunk in trace.chunks for place in chunk.steps} <= set(range(len(trace.steps)))
        # What was said before is not said again here: it may be forgotten.
        assert "Ilse" not in turn.metadata["trace"]
        assert len(turn.metadata["trace"]) < 4000
