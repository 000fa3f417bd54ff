"""List the docstrings that are no sentences: `python -m tests.support.sentences PATH...`."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FEWEST_WORDS = 4
# A function's docstring begins with what the function does (an imperative); a preposition, an article or a pronoun
# begins a phrase without a verb, or a sentence whose subject stands elsewhere.
NO_VERB = frozenset(
    """a about after all an and another any as at because before beside between both but by each either every few for
    from he her here his how i if in instead into it its many more most neither no none not of off on one only
    or other our own per so some such than that the their them then there these they this those through to too
    twice under until upon what when where whether which while who whoever whose with within without yes you
    your""".split()
)
PERSONS = re.compile(r"\b(he|his|him|she|whoever|whoso|nobody)\b", re.IGNORECASE)


def problems(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, complaint and first line of each docstring in a file that is no sentence."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        line = getattr(node, "lineno", 1)
        first = re.split(r"(?<=[.:;])\s|\n\n", text, maxsplit=1)[0]
        words = re.findall(r"[\w`'.-]+", first)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if len(words) < FEWEST_WORDS:
            yield line, f"fewer than {FEWEST_WORDS} words", first
        elif function and words[0].lower() in NO_VERB:
            yield line, f"begins with {words[0]!r}, not with what the function does", first
        elif PERSONS.search(text):
            yield line, "speaks of a person by a pronoun", first


def main() -> int:
    """Print what is wrong in the files and folders of the command line, and return how much it is (at most 1)."""
    found = 0
    for root in map(Path, sys.argv[1:]):
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            for line, complaint, first in problems(path):
                print(f"{path}:{line}: {complaint}: {first}")
                found += 1
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
