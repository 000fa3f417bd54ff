"""Samples of ICAE's training: what is read, what is refused, how texts become samples."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from model_worker.errors import InputError
from model_worker.icae.data import (
    INSTRUCTION,
    PRETRAINING,
    InstructionSet,
    JsonLines,
    JsonTexts,
    PretrainingSet,
    Sample,
    SampleRules,
    TextEncoder,
    Tokens,
    chat_delimiters,
    draw,
    is_json,
    text_pieces,
)
from model_worker.text_files import read_book
from tests.train.icae_runs import BOS, EOS, tokenizer, words


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a line of JSON"),
        ('["text"]', "not a JSON object but list"),
        ('{"txt": "w12"}', "'text' is missing"),
        ('{"text": 3}', "'text' is int"),
        ('{"text": "  "}', "'text' is empty"),
        ('{"text": "\udcff"}', "not a line of JSON"),
        ('{"text": "w12 \\ud800"}', "'text' has half of a surrogate pair"),
        ('{"text": ' + 100_000 * "[", "not a line of JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line_before_training(tmp_path: Path, line: str, said: str):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "w12"}}\n\n{line}\n', errors="surrogateescape")
    with pytest.raises(InputError, match=said) as caught:
        JsonLines(path, PRETRAINING)
    assert f"{path}:3:" in str(caught.value)


def test_packed_lines_are_those_that_were_packed(tmp_path: Path):
    lines = [json.dumps({"text": f"w{number} " * 5}) for number in range(3)]
    plain, packed = tmp_path / "data.jsonl", tmp_path / "data.jsonl.gz"
    plain.write_text("\n\n".join(lines))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert is_json(packed)
    assert not is_json(tmp_path / "book.txt.gz")
    assert list(JsonLines(packed, PRETRAINING)) == list(JsonLines(plain, PRETRAINING))
    assert JsonLines(packed, PRETRAINING).where(2) == f"{packed}:5"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"cannot read .*gz"):
        JsonLines(packed, PRETRAINING)


def test_files_that_are_missing_or_empty_are_refused(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no lines"):
        JsonLines(tmp_path / "empty.jsonl", PRETRAINING)
    with pytest.raises(InputError, match="cannot read"):
        JsonLines(tmp_path / "none.jsonl", PRETRAINING)
    with pytest.raises(InputError, match="cannot read"):
        text_pieces(tmp_path / "none.txt", TextEncoder(tokenizer(), BOS), 8)


def test_bos_and_eos_are_the_models_own(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "w12 w13 w14"}\n\n{"text": "w15"}\n')
    texts = JsonTexts(JsonLines(path, PRETRAINING), TextEncoder(tokenizer(), BOS))
    assert [texts.ids(0), texts.ids(1)] == [[BOS, 12, 13, 14], [BOS, 15]]
    sample = PretrainingSet([texts], SampleRules(lm_ratio=0), EOS)[1]
    assert (sample.context, sample.target) == ((BOS, 15), (BOS, 15, EOS))
    bare = PretrainingSet(
        [JsonTexts(JsonLines(path, PRETRAINING), TextEncoder(tokenizer(), None))], SampleRules(0), None
    )
    assert (bare[1].context, bare[1].target) == ((15,), (15,))


def test_instructions_encode_the_context_as_pretraining_does(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"input": "w12 w13 w14", "prompt": "w20 w21", "answer": "w30"}) + "\n")
    encoder = TextEncoder(tokenizer(), BOS)
    samples = InstructionSet(JsonLines(path, INSTRUCTION), encoder, EOS, context=3)
    assert samples[0] == Sample("ft", (BOS, 12, 13), (30, EOS), prompt=(20, 21))
    with pytest.raises(InputError, match=r":1: the field 'text' is missing"):
        JsonLines(path, PRETRAINING)


def test_a_plain_text_is_read_as_an_evaluation_reads_it(tmp_path: Path):
    """Lines within a paragraph joined; a .gz is the same text."""
    paragraphs = "w10 w11\r\nw12\n\nw13\nw14"
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_bytes(paragraphs.encode())
    packed.write_bytes(gzip.compress(paragraphs.encode()))
    assert read_book(plain) == read_book(packed) == "w10 w11 w12\n\nw13 w14"
    seen: list[str] = []

    class Watched(TextEncoder):
        def document(self, text: str) -> list[int]:
            seen.append(text)
            return super().document(text)

    for path in (plain, packed):
        assert text_pieces(path, Watched(tokenizer(), BOS), 8).ids(0) == [BOS, 10, 11, 12, 13, 14]
    assert seen == [read_book(plain)] * 2


@pytest.mark.parametrize("damage", ["truncated", "no gzip", "broken stream", "not UTF-8"])
def test_a_damaged_book_is_one_clear_error(tmp_path: Path, damage: str):
    packed = gzip.compress(" ".join(f"w{word}" for word in words(400)).encode())
    broken = packed[:10] + b"\xff" * 20 + packed[30:]
    content = {"truncated": packed[:-40], "no gzip": b"w12 w13", "broken stream": broken, "not UTF-8": None}[damage]
    path = tmp_path / "book.txt.gz"
    path.write_bytes(gzip.compress(b"w12 \xff") if content is None else content)
    with pytest.raises(InputError, match=r"cannot read .*book\.txt\.gz: \S"):
        read_book(path)
    with pytest.raises(InputError, match=r"cannot read .*book\.txt\.gz: \S"):
        text_pieces(path, TextEncoder(tokenizer(), BOS), 8)


def test_nothing_to_train_on_is_refused(tmp_path: Path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"empty\.txt has no text"):
        text_pieces(tmp_path / "empty.txt", TextEncoder(tokenizer(), BOS), 8)
    for nothing in ([], [Tokens([])]):
        with pytest.raises(InputError, match="no text to draw"):
            PretrainingSet(nothing, SampleRules(), EOS)


def test_a_plain_text_becomes_pieces_without_losing_any(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"w{i}" for i in range(10, 40)))
    texts = text_pieces(path, TextEncoder(tokenizer(), BOS), 8)
    whole = [token for i in range(len(texts)) for token in texts.ids(i)]
    assert whole == [BOS, *range(10, 40)]


def test_continuations_follow_the_sampling_rules():
    rules = SampleRules(lm_ratio=1, context=20, leave=3, min_lm=6)
    text = list(range(10, 50))
    cuts = set()
    for seed in range(300):
        sample = draw(text, np.random.default_rng(seed), rules, EOS)
        assert len(sample.context) == 20  # longer than `context`: a window, then all after it, cut to `context`
        at = sample.context[0] - 10
        if sample.objective == "lm":
            assert sample.context + sample.target == tuple(text[at : at + 20 + len(sample.target)])
            assert len(sample.target) == min(20, 20 - at) > 6
            assert sample.scored == sample.target[3:]
        else:
            assert 20 - at <= 6
        cuts.add(at)
    assert cuts == set(range(21))
    with pytest.raises(InputError, match="without loss"):
        SampleRules(leave=8, min_lm=4)


def test_a_text_too_short_to_continue_is_restored_whole():
    rules = SampleRules(lm_ratio=1, context=20, leave=3, min_lm=6)
    seen = set()
    for seed in range(200):
        sample = draw(words(12), np.random.default_rng(seed), rules, EOS)
        if sample.objective == "ae":  # the authors' code restores the cut-off front and drops the rest
            assert sample.context == tuple(words(12))
        else:
            assert len(sample.target) > 6
            assert sample.context + sample.target == tuple(words(12))
            seen.add(len(sample.context))
    assert seen == set(range(1, 6))


def test_the_mix_is_the_ratio_asked_for_and_samples_are_seeded():
    texts = Tokens([words(80, seed) for seed in range(7)])
    samples = PretrainingSet([texts, texts], SampleRules(0.4, 20, 2, 4), EOS, seed=5, passes=40)
    drawn = [samples[i] for i in range(len(samples))]
    assert len(drawn) == 14 * 40
    share = sum(sample.objective == "lm" for sample in drawn) / len(drawn)
    assert 0.3 < share < 0.45  # a little below: some continuations are too short
    assert drawn[14] != drawn[0]  # another pass over the same text draws anew
    again = PretrainingSet([texts, texts], SampleRules(0.4, 20, 2, 4), EOS, seed=5, passes=40)
    assert [again[i] for i in reversed(range(len(again)))] == drawn[::-1]
    assert PretrainingSet([texts], SampleRules(0.4, 20, 2, 4), EOS, seed=6)[0] != drawn[0]


def test_chat_templates_are_split_around_the_user():
    with_chat = tokenizer()
    with_chat.chat_template = (
        "w40 {% for m in messages %}w41 {{ m.content }} w42{% endfor %}{% if add_generation_prompt %} w43{% endif %}"
    )
    assert chat_delimiters(with_chat) == ((40, 41), (42, 43))
    assert chat_delimiters(tokenizer()) == ((), ())
    with_chat.chat_template = "w40"
    with pytest.raises(InputError, match="one piece"):
        chat_delimiters(with_chat)
