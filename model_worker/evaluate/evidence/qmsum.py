"""Meetings of QMSum (Zhong et al. 2021): which turns of a meeting answer a question is told by the data set.

A passage is one turn, as `speaker: words`. A specific query has `relevant_text_span`, from one turn to another, both
included; the evidence is every turn in them, short ones too. General queries have no span and are not asked.
"""

from pathlib import Path
from typing import Any

from model_worker.errors import InputError
from model_worker.evaluate.evidence.collection import Collection, Question
from model_worker.evaluate.evidence.reading import json_lines


def meetings(folder: Path) -> list[Collection]:
    """Read the meetings of every `*.jsonl` in a folder. Raises InputError for files that are not QMSum's."""
    found = []
    for name, record in json_lines(folder):
        try:
            turns = [f"{_words(turn['speaker'])}: {_words(turn['content'])}" for turn in record["meeting_transcripts"]]
            questions = [
                Question(_words(query["query"]), _turns(query["relevant_text_span"], len(turns)), "questions")
                for query in record["specific_query_list"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{name} is no meeting of QMSum: {type(error).__name__}: {error}") from None
        found.append(Collection(name, turns, [each for each in questions if each.evidence]))
    return found


def _words(text: Any) -> str:
    """Return a text as it is. Raises TypeError for what is none."""
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return text


def _turns(spans: list[list[str]], count: int) -> frozenset[int]:
    """Return the turns in spans of first and last turn; a few spans of the data set end behind the meeting."""
    return frozenset(turn for first, last in spans for turn in range(int(first), int(last) + 1) if 0 <= turn < count)
