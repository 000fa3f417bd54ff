"""The tasks of the evaluation `ruler` by name, and the prompts that a seed makes of them.

They are made after RULER (Hsieh et al. 2024, arXiv 2404.06654), section 3: needles, variable tracking, common words and
frequent words. Deviations: texts, words and questions are our own; keys are made-up names and numbers have five digits;
lines are hidden behind sentences of a text that a person chooses; variables and lists have no worked example in front;
an answer may have fewer tokens (24 to 96; RULER allows 30 to 128).
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from model_worker.errors import InputError
from model_worker.evaluate.ruler.counted import common, frequent
from model_worker.evaluate.ruler.hidden import multi_key, multi_query, multi_value, single, tracking
from model_worker.evaluate.ruler.prompt import Prompt, Source


@dataclass(frozen=True, slots=True)
class Task:
    """A task, as RULER groups it (kind). make: returns a prompt of so many tokens, drawn."""

    kind: str
    make: Callable[[Source, int, random.Random], Prompt]


RETRIEVAL, TRACING, AGGREGATION = "retrieval", "multi-hop tracing", "aggregation"
TASKS: Mapping[str, Task] = {
    "single": Task(RETRIEVAL, single),
    "multi-key": Task(RETRIEVAL, multi_key),
    "multi-value": Task(RETRIEVAL, multi_value),
    "multi-query": Task(RETRIEVAL, multi_query),
    "variables": Task(TRACING, tracking),
    "common-words": Task(AGGREGATION, common),
    "frequent-words": Task(AGGREGATION, frequent),
}


def prompt_of(source: Source, task: str, tokens: int, seed: int, index: int) -> Prompt:
    """Return the prompt with this number of a task; the same arguments give the same prompt.

    tokens: of text, question and answer together. Raises InputError for a task that is not there, and for a length that
    is too short for it.
    """
    if task not in TASKS:
        raise InputError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    return TASKS[task].make(source, tokens, random.Random(f"kvbank-ruler:{seed}:{task}:{tokens}:{index}"))
