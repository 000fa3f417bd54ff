"""Chats of MemoryBank (Zhong et al. 2023): ten users, ten days each, and probing questions about them.

The data set does not say where the answers are. We have read the chats and noted for each question the turns that
answer it, by their number among the user's turns (`assets/evidence/memorybank.json`); a question about a day has the
turns of that day with something to tell. The one question that no turn answers is not asked. A passage is one turn, the
user's words and the companion's, under its date in the form in which the questions name dates.
"""

import json
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from model_worker.errors import InputError
from model_worker.evaluate.evidence.collection import Collection, Question
from model_worker.evaluate.evidence.reading import parsed
from model_worker.text_files import read_text

_FILE = Path(__file__).parents[2] / "assets" / "evidence" / "memorybank.json"


@cache
def _evidence() -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def chats(folder: Path) -> list[Collection]:
    """Read `chats.json` and `probing_questions.json` of a folder, a collection for each user.

    Raises InputError for files that are not MemoryBank's, and for other questions than those that we have read.
    """
    questions, users = (
        parsed(str(folder / name), read_text(folder / name)) for name in ("probing_questions.json", "chats.json")
    )
    return [_chat(f"{folder}, {name}", name, users, questions) for name in _evidence()]


def _chat(where: str, name: str, users: Any, questions: Any) -> Collection:
    """Return the turns of a user, and the user's questions. where: for errors. Raises InputError."""
    try:
        turns = _turns(users[name]["history"])
        pairs = zip(questions[name], _evidence()[name], strict=True)
        asked = [Question(str(text), frozenset(evidence), "questions") for text, evidence in pairs if evidence]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: not the chats of MemoryBank: {type(error).__name__}: {error}") from None
    if any(turn >= len(turns) for each in asked for turn in each.evidence):
        raise InputError(f"{where}: there are only {len(turns)} turns, not those of MemoryBank")
    return Collection(name, turns, asked)


def _turns(history: dict[str, Any]) -> list[str]:
    """Return the turns of all days, in order."""
    return [
        f"{_day(day)}\nUser: {turn['query']}\nCompanion: {turn['response']}"
        for day, turns in history.items()
        for turn in turns
    ]


def _day(text: str) -> str:
    """Return a date as the questions write it: May 4th for 2023-05-04."""
    day = date.fromisoformat(text)
    ending = "th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return f"{day:%B} {day.day}{ending}"
