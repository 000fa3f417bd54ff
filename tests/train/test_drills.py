"""Drills teach what a memory holds: wanted tokens stand in a chunk, and nothing that evaluations ask for is drawn."""

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from model_worker.attachment.model_names import model_folder
from model_worker.evaluate.wordings import GROUPS, WORDINGS
from model_worker.text_files import reference_text
from model_worker.train.drills import CopyDrill, Drill, DrillRow, DrillShape, FactDrill
from model_worker.user_text import encode_text

SHAPE = DrillShape(chunk=64, blocks=4, attended=8)
# The part of each statement, before or behind the name, by which a text shows that it was made in that wording.
_CUES = {name: max(own.statement.split("{name}"), key=len) for name, own in WORDINGS.items()}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(model_folder("kvbank-small")))


def drill(kind: type[Drill], tokenizer: Any, seed: int = 0) -> Drill:
    texts = [np.array(encode_text(tokenizer, reference_text()[:40_000]))]
    return kind(tokenizer, texts, SHAPE, seed)


def runs(wanted: np.ndarray) -> list[tuple[int, int]]:
    """Return where runs of wanted tokens begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wanted.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("kind", [FactDrill, CopyDrill])
def test_a_row_has_its_shape_and_comes_again_with_its_seed(kind: type[Drill], tokenizer: Any) -> None:
    rows = [drill(kind, tokenizer).row() for _ in range(2)]
    for row in rows:
        assert row.ids.shape == row.wanted.shape == (4 * 64,)
        assert row.chunks.shape == (8, 64)
        assert row.ids[0] == tokenizer.bos_token_id
        assert row.wanted.any()
        assert not row.wanted[0]
    assert np.array_equal(rows[0].ids, rows[1].ids)
    assert not np.array_equal(rows[0].ids, drill(kind, tokenizer, seed=1).row().ids)


def test_every_answer_stands_in_a_chunk(tokenizer: Any) -> None:
    """Test that the text of each answer stands in a chunk of its row."""
    source, asked = drill(FactDrill, tokenizer), 0
    for _ in range(60):
        row = source.row()
        texts = [tokenizer.decode(chunk) for chunk in row.chunks]
        for begin, end in runs(row.wanted):
            answer = tokenizer.decode(row.ids[begin:end])
            assert answer.endswith(".")
            assert any(answer in text for text in texts), answer
            asked += 1
    assert asked > 120


def test_wordings_that_are_held_out_are_never_told(tokenizer: Any) -> None:
    source = drill(FactDrill, tokenizer)
    told = " ".join(tokenizer.decode(np.concatenate([row.chunks.ravel(), row.ids])) for row in _rows(source, 150))
    for name in GROUPS["held-out"]:
        assert _CUES[name] not in told
    assert all(_CUES[name] in told for name in GROUPS["trained"])


def test_questions_stand_behind_any_number_of_local_tokens(tokenizer: Any) -> None:
    source = drill(FactDrill, tokenizer)
    places = [begin for row in _rows(source, 150) for begin, _ in runs(row.wanted)]
    counts, _ = np.histogram(places, bins=4, range=(0, 256))
    assert counts.min() > len(places) / 8
    assert min(places) < 24


def test_a_copied_span_stands_in_a_chunk(tokenizer: Any) -> None:
    for row in _rows(drill(CopyDrill, tokenizer), 10):
        spans = runs(row.wanted)
        assert len(spans) == 4
        for begin, end in spans:
            span = row.ids[begin - 5 : end].tolist()
            windows = np.lib.stride_tricks.sliding_window_view(row.chunks, len(span), axis=1)
            assert (windows == span).all(-1).any()


def _rows(source: Drill, count: int) -> list[DrillRow]:
    return [source.row() for _ in range(count)]
