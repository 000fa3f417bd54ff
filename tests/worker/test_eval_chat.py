"""The command `kvbank eval chat` holds real conversations, and asks each way for what was told in the beginning."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvbank
from model_worker.attachment.loading import load_model
from model_worker.errors import InputError, WorkerError
from model_worker.evaluate.chat_plan import Plan, script, sentences_of
from model_worker.evaluate.chat_run import ChatRun
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.wordings import GROUPS
from model_worker.model import MemoryModel
from model_worker.session.preset import SessionPreset
from tests.support import command
from tests.worker.tiny import bank

OTHERS = [
    f"The house with the number {number} stood at the end of a long road, and nobody had lived in it for years."
    for number in range(3, 30)
]


def plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {"turns": (2, 12), "facts": 3, "wording": ("number",), "ask": "complete", "answer": 6}
    return Plan(**{**given, "conversations": 1, "seed": 3, **changes})


@pytest.fixture(scope="module")
def worker(client: kvbank.Client) -> Iterator[MemoryModel]:
    """Attach the shipped model, which tells numbers that it recalls."""
    with MemoryModel(*load_model(), memory=client, bank=bank(), strict=True, patience=120.0) as model:
        yield model


def run(worker: MemoryModel, journal: Path | None = None, **changes: Any) -> dict[str, Any]:
    preset = SessionPreset.of(worker.model, worker.chunk)
    return ChatRun(worker, OTHERS, plan(**changes), preset, Journal(journal, {}), lambda *_: None).report()


def test_sentences_are_said_as_they_stand() -> None:
    text = "CHAPTER I\n\nIt was a dark\nnight. “Who goes there at all?” he asked me. Yes.\n\nNobody could see the road!"
    assert sentences_of(text) == ["It was a dark night.", "“Who goes there at all?”", "Nobody could see the road!"]
    with pytest.raises(InputError, match="no sentence of 4 to 40 words"):
        sentences_of("One two three. " + "long " * 50)


def test_a_seed_gives_a_conversation() -> None:
    own = script(OTHERS, plan(facts=2, wording=("number", "city")), 3)
    assert own == script(OTHERS, plan(facts=2, wording=("number", "city")), 3)
    assert own != script(OTHERS, plan(facts=2, wording=("number", "city")), 4)
    assert [fact.wording for fact in own.facts] == ["number", "city", "number", "city"]
    grouped = script(OTHERS, plan(facts=1, wording=("number", "trained")), 3).facts
    assert [fact.wording for fact in grouped] == ["number", *(name for name in GROUPS["trained"] if name != "number")]
    assert sorted(own.questions) == sorted(fact.beginning for fact in own.facts)
    assert own.others[0] in OTHERS
    assert len(script(OTHERS[:5], plan(), 3).others) == 12  # said again where they end
    assert script(OTHERS, plan(ask="chat"), 3).questions[0].endswith("?")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ask": "sing"}, "ask 'sing' is not one of"),
        ({"wording": ("room", "room")}, "given twice"),
        ({"wording": ("song",)}, "no wording 'song'; there are number.* trained"),
    ],
)
def test_plans_that_make_no_sense(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan(**wrong)


@pytest.mark.slow
def test_facts_are_told_by_the_memory_alone(
    worker: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test counts at two places, the second of which is behind the window; that no question of the first is in the
    memory of the second; and that a run which is finished is not held again."""
    said: dict[str, list[str]] = {}
    forget = type(worker.client.sessions).forget

    def noted(sessions: Any, session_id: str) -> kvbank.Receipt:
        said[sessions.get(session_id).name] = [turn.text("user") for turn in sessions.turns(session_id)]
        return forget(sessions, session_id)

    monkeypatch.setattr(type(worker.client.sessions), "forget", noted)
    found = run(worker, tmp_path / "run.jsonl")
    counts = {(row["turns"], row["way"]): row["right"] for row in found["answers"] if row["wording"] == "all"}
    assert (2, "whole context") in counts
    assert (12, "whole context") not in counts  # longer than the model was trained for
    assert counts[12, "no memory"] == 0
    assert counts[12, "told"] == 3
    assert counts[12, "whole"] == counts[12, "found"] == counts[12, "empty window"] == 3
    assert [(own["seed"], own["turns"], own["asked"]) for own in found["conversations"]] == [(3, 2, 3), (3, 12, 3)]
    assert found["conversations"][1]["tokens"] > found["window"] + 64
    questions = script(OTHERS, plan(), 3).questions
    assert said["chat-3"][5:] == questions
    assert said["chat-3-behind-2"][15:] == questions
    assert not set(questions) & set(said["chat-3-behind-2"][:15])
    assert not {own.name for own in worker.client.list_banks() if own.name.startswith("session-")}
    said.clear()
    again = run(worker, tmp_path / "run.jsonl")
    assert again["answers"] == found["answers"]
    assert not said
    assert list(worker.client.sessions.list()) == []


def test_a_question_needs_a_chat_template(worker: MemoryModel) -> None:
    """Test that this is said before a conversation is held."""
    with pytest.raises(InputError, match="the model has no chat template: its facts can only be completed"):
        run(worker, ask="chat")
    assert list(worker.client.sessions.list()) == []


def measured(folder: Path, *options: str) -> dict[str, Any]:
    """Return the document of the command, and check that it draws its figure."""
    (folder / "text.txt").write_text("\n\n".join(OTHERS), encoding="utf-8")
    given = ["--text", folder / "text.txt", "--facts=2", "--answer=6", "--seed=3", *options]
    ended = command.run(command.application(), "eval", "chat", *given, "--json", "--plot", folder / "chat.svg")
    assert ended.exit_code == 0, ended.stderr
    assert "<svg" in (folder / "chat.svg").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    found = measured(tmp_path, "--turns=6")
    told = {row["way"]: row["right"] for row in found["answers"] if row["wording"] == "all"}
    assert (told["found"], told["told"], found["restarted"], found["form"]) == (2, 2, False, "complete")
    given = "--seed 3 --text text.txt --turns 6 --facts 2 --answer 6"
    assert found["command"] == f"kvbank eval chat {given}"


@pytest.mark.slow
def test_the_command_after_a_restart(tmp_path: Path) -> None:
    """Test the whole way, with a service that is killed and a process that did not hold the conversation."""
    found = measured(tmp_path, "--turns=10", "--restart")
    told = {row["way"]: row["right"] for row in found["answers"] if row["wording"] == "all"}
    assert (told["told"], told["no memory"], found["restarted"]) == (2, 0, True)


@pytest.mark.slow
def test_the_shipped_model_tells_what_it_was_told_a_hundred_turns_ago() -> None:
    """Test the settings that a chat with it has of its own, over the Python reference."""
    ended = command.run(command.application(), "eval", "chat", "--turns=100", "--seed=5", "--json")
    assert ended.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [own["told"] >= 9 for own in found["conversations"]] == [True]


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    from model_worker.cli.asking_process import Asking, ask_in_process
    from model_worker.cli.measured_model import MeasuredModel

    options = MeasuredModel(model=str(tmp_path / "nothing"))
    asking = Asking(options=options, address="127.0.0.1:1", name="a", questions=(), answer=1)
    with pytest.raises(WorkerError, match=r"ended with 1: .*nothing"):
        ask_in_process(asking)
