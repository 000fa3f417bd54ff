"""A conversation whose client sends all of it again each time costs what one costs that the worker remembers."""

from typing import Any

import openai
import pytest

from model_worker.model import MemoryModel
from model_worker.session.preset import SessionPreset
from model_worker.session.session import Session
from tests.worker_http.conftest import CHUNK, WINDOW, Running
from tests.worker_http.test_chat import ask

# Tokens of an answer, and those that the format of a turn adds to its texts, with the end of the answer before it.
ANSWER, FORMAT = 4, 40


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def fed(usage: Any) -> int:
    """Return the tokens of a request that the model was fed, but for its answer."""
    return int(usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("turns", [12, 50])
def test_what_is_sent_again_is_not_fed_again(
    worker: Running, client: openai.OpenAI, model_folder: Any, turns: int
) -> None:
    name = f"long {turns}"
    options = {"max_completion_tokens": ANSWER, "extra_headers": {"X-Kvbank-Session": name}}
    texts = [f"{number} ships" for number in range(turns)]
    messages, answers = list[dict[str, str]](), list[str]()
    for text in texts:
        found = ask(client, [*messages, user(text)], **options)
        answers.append(found.choices[0].message.content)
        messages += [user(text), {"role": "assistant", "content": answers[-1]}]
        assert fed(found.usage) <= len(text) + FORMAT
    assert found.usage.prompt_tokens > WINDOW  # what was recalled too

    # As a program does that has the session open.
    memory = worker.served.clients.target
    model = MemoryModel.from_pretrained(str(model_folder), memory=memory, bank=(), chunk=CHUNK, window=WINDOW)
    with worker.served.clients.client("none") as service:
        line = [turn.text("assistant") for turn in service.sessions.turns(service.sessions.get(name=name).session_id)]
    assert line == answers
    preset = SessionPreset.of(model.model, model.chunk)
    with Session.open(model, window=preset.window, **preset.memory) as session:
        said = [session.say(text, max_new_tokens=ANSWER, temperature=0).text("assistant") for text in texts]
    assert said == answers

    # A message of ten turns ago is another one now.
    at = 2 * (turns - 10)
    edited = ask(client, [*messages[:at], user("no ships")], **options)
    answered = {"role": "assistant", "content": edited.choices[0].message.content}
    assert fed(edited.usage) <= WINDOW + len("no ships") + FORMAT  # its window had other turns in it
    after = ask(client, [*messages[:at], user("no ships"), answered, user("why?")], **options)
    assert fed(after.usage) <= len("why?") + FORMAT
    before = ask(client, [*messages, user("go on")], **options)
    assert fed(before.usage) <= len("go on") + FORMAT
