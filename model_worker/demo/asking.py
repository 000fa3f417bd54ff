"""The facts of the demo, and how well a model answers for them by what it remembers and by reading it again."""

from collections.abc import Sequence

from model_worker.attachment.model_names import SHIPPED
from model_worker.evaluate.asking import MEMORY, REREAD, Asker, room_for_local
from model_worker.evaluate.facts import make_facts
from model_worker.evaluate.wordings import WordedFact, worded_facts
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.user_text import encode_text

# Of a pretrained model; the shipped one was trained for numbers alone.
_WORDINGS = ("number", "city", "colour", "animal")
_FORM = "complete"
Score = tuple[int, int]


def demo_facts(model: str, seed: int, count: int) -> list[WordedFact]:
    """Return facts of the kind that a model can be asked for: numbers for the shipped model, words too for others."""
    if model != SHIPPED:
        return worded_facts(seed, _WORDINGS, -(-count // len(_WORDINGS)))[:count]
    return [
        WordedFact(
            "number", fact.name, fact.statement, fact.question, f"What is the number of {fact.name}?", fact.number
        )
        for fact in make_facts(seed, count)
    ]


def answer(model: MemoryModel, fact: WordedFact, memory: Memory | bool = True) -> bool:
    """Ask for a fact in a fresh context, greedily; return whether the answer is right to its last letter."""
    out = model.generate(
        fact.beginning,
        cache=model.cache(memory),
        max_new_tokens=len(model.ids(f" {fact.answer}")) + 1,
        do_sample=False,
        eos_token_id=None,
    )
    assert isinstance(out, str)
    return fact.answered(out, _FORM)


def ask_beside(
    model: MemoryModel, memory: Memory, facts: Sequence[WordedFact], local: Sequence[int], start: int
) -> dict[str, Score | None]:
    """Ask by memory and by reading the same hits again, behind a local text that fills the window as far as it goes.

    local: tokens of the text. start: the offset of the first of them in what was read. Returns (right, asked) by way;
    None where the model has no room to read the hits again.
    """
    longest = max((encode_text(model.tokenizer, f"\n{fact.beginning}") for fact in facts), key=len, default=[])
    asker = Asker(model, memory, local[: room_for_local(model, longest, _FORM)], start)
    asked = [asker.ask(fact, -1, _FORM, (MEMORY, REREAD)).right for fact in facts]
    return {way: _score([right[way] for right in asked]) for way in (MEMORY, REREAD)}


def _score(answers: Sequence[bool | None]) -> Score | None:
    if None in answers:
        return None
    return sum(map(bool, answers)), len(answers)
