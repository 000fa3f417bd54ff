"""`kvbank eval evidence` counts what a search through a bank finds, beside BM25 and chance."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

import kvbank
from model_worker.cli.commands import evaluation
from model_worker.embed import CallableEmbedder, embedded, embedded_queries, embedder
from model_worker.errors import InputError
from model_worker.evaluate.evidence.bm25 import Bm25
from model_worker.evaluate.evidence.collection import Collection, Question
from model_worker.evaluate.evidence.memorybank import chats
from model_worker.evaluate.evidence.qmsum import meetings
from model_worker.evaluate.evidence.recall import Recall, measure_recall
from model_worker.evaluate.evidence.statements import planted, statements
from tests.worker.tiny import bank

WORDS = re.compile(r"\w+")
# Words that any two sentences may share.
COMMON = set(
    "the a an of in on at to from with for and is are was were be been do does did what which when where who whom how "
    "why i my me we our he his him her she it its they their that this there one by into up off out so any more can "
    "now shall has have had as not no but than before after when while many much long whose us go get place time day "
    "will if again".split()
)


def content(text: str) -> set[str]:
    return set(WORDS.findall(text.lower())) - COMMON


def rows(measured: list[Recall], way: str) -> dict[tuple[str, int], Recall]:
    return {(row.kind, row.k): row for row in measured if row.way == way}


# -- the sets ---------------------------------------------------------------------------------------------------------


def test_questions_in_other_words_share_none_with_their_statements() -> None:
    own = statements()
    assert len(own) == len({each.statement for each in own}) == 60
    for each in own:
        assert content(each.statement) & content(each.same)
        assert not content(each.statement) & content(each.other), each


PASSAGES = [f"passage number {place} of some other text" for place in range(500)]


def test_statements_are_planted_where_the_evidence_says() -> None:
    alone, inside = planted(PASSAGES, 200, seed=3)
    for found in (alone, inside):
        assert len(found.passages) == 200
        assert len(found.questions) == 120
        for question in found.questions:
            [place] = question.evidence
            [own] = [each for each in statements() if question.text in (each.same, each.other)]
            assert own.statement in found.passages[place]
            assert ("same" in question.kind) == (question.text == own.same)
            assert (own.statement == found.passages[place]) == (found is alone)
    assert sum(passage in PASSAGES for passage in inside.passages) == 140
    assert planted(PASSAGES, 200, seed=3) == [alone, inside]
    assert planted(PASSAGES, 200, seed=4) != [alone, inside]


def test_halves_of_the_statements_are_all_of_them() -> None:
    """Halves of the statements are planted among all of them, so that each is searched for among as many."""
    whole, even, odd = (planted(PASSAGES, 200, half=half)[0] for half in ("all", "even", "odd"))
    assert whole.passages == even.passages == odd.passages
    assert {q.text for q in even.questions}.isdisjoint(q.text for q in odd.questions)
    assert {q.text for q in whole.questions} == {q.text for q in (*even.questions, *odd.questions)}
    with pytest.raises(InputError, match="too few"):
        planted(PASSAGES, 60)


def meeting(**changes: Any) -> dict[str, Any]:
    turns = [{"speaker": "A", "content": f"words {place}"} for place in range(6)]
    queries = [{"query": "where", "answer": "", "relevant_text_span": [["1", "2"], ["5", "9"]]}]
    return {"meeting_transcripts": turns, "specific_query_list": queries, "general_query_list": [], **changes}


def test_meetings(tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text(json.dumps(meeting()) + "\n\n" + json.dumps(meeting()) + "\n")
    first, second = meetings(tmp_path)
    assert first.passages == second.passages == [f"A: words {place}" for place in range(6)]
    assert first.questions == [Question("where", frozenset({1, 2, 5}), "questions")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no JSON"),
        ("{}", "no meeting of QMSum"),
        ("[]", "no meeting of QMSum"),
        (json.dumps(meeting(specific_query_list=[{"query": "q", "relevant_text_span": [["a", "b"]]}])), "no meeting"),
        (json.dumps(meeting(specific_query_list=[{"query": None, "relevant_text_span": []}])), "None is no text"),
        (json.dumps(meeting(meeting_transcripts=[{"speaker": "A", "content": None}])), "None is no text"),
        (None, r"no file \*\.jsonl"),
    ],
)
def test_meetings_that_are_damaged(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "val.jsonl").write_text(text)
    with pytest.raises(InputError, match=reason):
        meetings(tmp_path)


NOTED = json.loads((Path(__file__).parents[2] / "model_worker" / "assets" / "evidence" / "memorybank.json").read_text())


def write_chats(folder: Path, turns: int = 60, questions: int = 7) -> None:
    """Write chats of the users whose evidence has been noted, with words of our own."""
    day = [{"query": f"asked {place}", "response": f"told {place}"} for place in range(turns)]
    users = {name: {"history": {"2023-05-02": day[:2], "2023-05-03": [], "2023-05-11": day[2:]}} for name in NOTED}
    (folder / "chats.json").write_text(json.dumps(users))
    (folder / "probing_questions.json").write_text(json.dumps({name: ["what"] * questions for name in NOTED}))


def test_chats(tmp_path: Path) -> None:
    write_chats(tmp_path)
    found = chats(tmp_path)
    assert [own.name for own in found] == list(NOTED)
    assert found[0].passages[1:3] == [
        "May 2nd\nUser: asked 1\nCompanion: told 1",
        "May 11th\nUser: asked 2\nCompanion: told 2",
    ]
    for own in found:
        assert [sorted(q.evidence) for q in own.questions] == [turns for turns in NOTED[own.name] if turns]


@pytest.mark.parametrize(("changes", "reason"), [({"turns": 9}, "only 9 turns"), ({"questions": 6}, "not the chats")])
def test_chats_of_another_version(tmp_path: Path, changes: dict[str, int], reason: str) -> None:
    """Chats of another version are refused: the turns that we noted mean nothing in them."""
    write_chats(tmp_path, **changes)
    with pytest.raises(InputError, match=reason):
        chats(tmp_path)


# -- the figures ------------------------------------------------------------------------------------------------------


def test_bm25_is_the_formula() -> None:
    """Against a plain computation of Robertson's sum, over random texts."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices("abcdefgh", k=draw.randrange(1, 12))) for _ in range(30)]
    index, average = Bm25(texts), sum(len(text.split()) for text in texts) / 30
    for query in ("a b", "a a h", "z", ""):
        for text, score in zip(texts, index.scores(query), strict=True):
            words, wanted = text.split(), 0.0
            for word in query.split():
                often, held = words.count(word), sum(word in other.split() for other in texts)
                idf = math.log(1 + (30 - held + 0.5) / (held + 0.5))
                wanted += idf * often * 2.5 / (often + 1.5 * (0.25 + 0.75 * len(words) / average))
            assert score == pytest.approx(wanted)


def turned(texts: list[str]) -> np.ndarray:
    """Return a vector at the angle that a text names in degrees, and zeros for a text without one."""
    found = [WORDS.search(text) for text in texts]
    angles = [math.radians(int(each[0])) if each else None for each in found]
    return np.array([(0.0, 0.0) if angle is None else (math.cos(angle), math.sin(angle)) for angle in angles])


ANGLES = CallableEmbedder(turned, name="angles", dimension=2)


def test_recall_by_hand() -> None:
    passages = ["0", "10", "20", "30", "40"]
    asked = [
        Question("12", frozenset({1}), "q"),
        Question("12", frozenset({0, 4}), "q"),
        Question("!", frozenset({0}), "q"),
    ]
    measured = measure_recall([Collection("c", passages, asked)], {"angles": ANGLES}, [1, 2, 3])
    found = rows(measured.rows, "angles")
    # By angle the passages stand in the order 1, 2, 0, ..; the third question has no vector, and finds nothing.
    assert [found["q", k].found for k in (1, 2, 3)] == [1, 1, 2]
    assert found["q", 1].asked == 3
    assert (found["q", 1].low, found["q", 1].high) == pytest.approx((0.0615, 0.7923), abs=1e-3)  # Wilson, 1 of 3
    chance = rows(measured.rows, "chance")["q", 2]
    assert chance.found == pytest.approx(2 / 5 + (1 - 3 / 10) + 2 / 5)
    assert [cost.texts for cost in measured.costs] == [7, 8]


def test_a_question_without_a_shared_word_finds_nothing_by_words() -> None:
    """Else the first passages would be found, whose score is no better than that of the others."""
    asked = [Question("other", frozenset({0}), "q"), Question("ten", frozenset({1}), "q")]
    measured = measure_recall([Collection("c", ["one", "ten"], asked)], {}, [1])
    assert rows(measured.rows, "bm25")["q", 1].found == 1


def test_a_bank_finds_what_is_counted(client: kvbank.Client) -> None:
    """Searches through the service find the same of the same passages and questions."""
    made, name = embedder("hybrid:lexical:idf+lexical:d=64"), bank()
    _, inside = planted(PASSAGES, 200, seed=1)
    client.create_bank(name, kv=None, embedding=kvbank.EmbeddingSpec(made.digest, made.dimension))
    new = [kvbank.NewChunk(row) for row in embedded(made, list(inside.passages))]
    written = client.write_many(name, new, reader_digest="", embedder_digest=made.digest)
    places = {line.chunk_id: place for place, line in enumerate(written)}
    queries = embedded_queries(made, [question.text for question in inside.questions])
    answers = client.retrieve(name, queries, top_k=4, embedder_digest=made.digest).queries
    hits: dict[str, int] = {}
    for question, answer in zip(inside.questions, answers, strict=True):
        found = {places[hit.chunk_id] for hit in answer}
        hits[question.kind] = hits.get(question.kind, 0) + bool(found & question.evidence)
    counted = rows(measure_recall([inside], {"made": made}, [4]).rows, "made")
    assert {kind: row.found for (kind, _), row in counted.items()} == hits
    assert hits["same words, inside"] > 0


def test_collections_without_questions_are_not_searched() -> None:
    """Test with what a meeting without turns, and one without questions, are read as."""
    asked = Collection("c", ["one", "two"], [Question("one", frozenset({0}), "q")])
    others = [Collection("empty", [], []), Collection("unasked", ["one"], [])]
    alone, among = (
        measure_recall(every, {"lexical": embedder("lexical")}, [1]) for every in ([asked], [*others, asked])
    )
    assert alone.rows == among.rows
    assert [cost.texts for cost in among.costs] == [3, 3]


def test_nothing_to_ask() -> None:
    with pytest.raises(InputError, match="no question"):
        measure_recall([Collection("c", ["a"], [])], {}, [1])


# -- the command ------------------------------------------------------------------------------------------------------


def kvbank_eval(*arguments: object) -> Result:
    return CliRunner().invoke(evaluation, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{place}" for place in range(4000)))
    plot = tmp_path / "plot.svg"
    options = ("evidence", "--text", text, "--passages", 100, "--embed", "lexical", "--k", 4, "--plot", plot)
    result = kvbank_eval(*options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["passages"], found["questions"]) == (200, 240)
    assert {row["way"] for row in found["recall"]} == {"lexical", "bm25", "chance"}
    assert found["command"] == "kvbank eval evidence --embed lexical --text text.txt --passages 100 --k 4"
    [same] = [r for r in found["recall"] if (r["way"], r["kind"]) == ("lexical", "same words, alone")]
    assert same["share"] == 1.0
    assert "recall at k" in plot.read_text()
    table = kvbank_eval(*options).output
    assert "recall@4" in table
    assert "cost of lexical" in table


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--set", "qmsum"), "Missing option '--data'"),
        (("--set", "qmsum", "--data", "/nonexistent"), "no folder"),
        (("--set", "memorybank", "--data", "."), "cannot read"),
        (("--embed", "hybrid:lexical"), "hybrid:A"),
        (("--passages", 50), "too few"),
        (("--set", "squality"), "squality"),
        (("--set", "qmsum", "--data", ".", "--half", "odd"), "--half is an option of statements, and not of qmsum"),
        (("--set", "memorybank", "--data", ".", "--passages", 2000), "--passages is an option of statements"),
        (("--data", "."), "--data is an option of qmsum and memorybank, and not of statements"),
    ],
)
def test_options_that_are_refused(options: tuple[object, ...], reason: str) -> None:
    result = kvbank_eval("evidence", *options)
    assert result.exit_code
    assert reason in f"{result.output} {result.exception}"
