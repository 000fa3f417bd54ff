"""Labelled examples of a task: read from a file, drawn by a seed, and written as demonstrations of a prompt.

The template is that of MemLong's code: `Review: ... Sentiment: ... .`, and `Input: ... Type: ... .` for subjectivity.
The module is pure and seeded.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model_worker.errors import InputError
from model_worker.text_files import read_text
from model_worker.user_text import readable

_SUBJECTIVITY = {"objective", "subjective"}


@dataclass(frozen=True, slots=True)
class Example:
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Task:
    """Examples of one file, by its name, the words in front of text and label, and all labels, sorted."""

    name: str
    examples: Sequence[Example]
    words: tuple[str, str]
    labels: tuple[str, ...]

    def asked(self, example: Example) -> str:
        """Return an example without its label, as it stands behind what is before it."""
        return f" {self.words[0]}: {example.text} {self.words[1]}:"

    def told(self, example: Example) -> str:
        """Return an example with its label: a demonstration."""
        return f"{self.asked(example)} {example.label} ."


@dataclass(frozen=True, slots=True)
class Draw:
    """What a seed draws of a task.

    items: what is asked. shots: demonstrations of the context. cached: for each item, which demonstrations of the bank
    are in its memory, by number. chosen: for each item, so many of them at random.
    """

    items: list[Example]
    shots: list[Example]
    cached: list[list[int]]
    chosen: list[list[int]]


def read_task(path: Path) -> Task:
    """Return the task of a file of JSON lines, each with a text and a label.

    The task has the name of the file, without `.jsonl` and `.gz`. Raises InputError for a line that has none, and for a
    file with a single label.
    """
    examples = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            text, label = found["text"], found["label"]
        except (ValueError, KeyError, TypeError):
            text = label = None
        if not isinstance(text, str) or not isinstance(label, str) or not text.strip() or not label.strip():
            raise InputError(f"{path}, line {number}: no JSON object with a text and a label")
        examples.append(Example(" ".join(readable(text).split()), label.strip()))
    labels = tuple(sorted({own.label for own in examples}))
    if len(labels) < 2:
        raise InputError(f"{path} has examples of {len(labels)} labels; a task has two or more")
    words = ("Input", "Type") if set(labels) == _SUBJECTIVITY else ("Review", "Sentiment")
    return Task(Path(path.name.removesuffix(".gz")).stem, examples, words, labels)


def parted(task: Task, demonstrations: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Return the demonstrations of the bank, and all other examples, in a drawn order."""
    drawn = random.Random(f"kvbank-icl:{task.name}:{seed}").sample(list(task.examples), len(task.examples))
    return drawn[:demonstrations], drawn[demonstrations:]


def drawn(others: Sequence[Example], items: int, shots: int, cached: int, chosen: int, of: int, seed: int) -> Draw:
    """Return what a seed draws.

    others: examples that are in no bank, from which items and shots come, so many. cached: numbers of demonstrations
    that are drawn anew for each item; chosen: so many of all at random; of: how many demonstrations the bank has.
    Raises InputError where the others are too few.
    """
    if len(others) < items + shots:
        raise InputError(f"{len(others)} examples are left beside the demonstrations; {items + shots} are needed")
    draw = random.Random(f"kvbank-icl:{seed}")
    taken = draw.sample(list(others), items + shots)
    return Draw(
        taken[:items],
        taken[items:],
        [draw.sample(range(of), cached) for _ in range(items)],
        [draw.sample(range(of), chosen) for _ in range(items)],
    )
