"""`measure` says what the model itself says, and its rows are what was stored."""

import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest
import torch
from tiny import tokens
from torch import nn
from transformers import PreTrainedModel

from model_worker.errors import InputError
from model_worker.evaluate.compression import cut, measure
from model_worker.evaluate.plot import lines

Models = Callable[[str], PreTrainedModel]
CHUNK, FOLLOW = 24, 10


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3"])
def test_full_and_nothing_are_the_models_own_losses(model: Models, family: str) -> None:
    net = model(family)
    documents = [tokens(CHUNK + FOLLOW, seed=seed)[0].tolist() for seed in range(3)]
    seen: list[int] = []
    rows = measure(
        net,
        None,
        documents,
        chunk=CHUNK,
        follow=FOLLOW,
        budgets=[6, CHUNK],
        methods=["window:m=N", "tova:m=N,block=5", "homer:m=N,leaf=8", "leaves"],
        progress=lambda done, total: seen.append(done * 10 + total),
    )
    assert seen == [13, 23, 33]
    assert [r.method for r in rows[:3]] == ["nothing", "full", "window:m=6"]
    assert [r.budget for r in rows] == [0, CHUNK, 6, 6, 6, 6, CHUNK, CHUNK, CHUNK, CHUNK]
    ids = torch.tensor(documents)
    with torch.no_grad():
        whole = net(ids).logits[:, CHUNK:]
        alone = net(ids[:, CHUNK:]).logits
    for row, logits in ((rows[0], alone), (rows[1], whole)):
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, CHUNK + 1 :].flatten())
        assert row.loss == pytest.approx(float(expected), abs=1e-5)
        assert row.low < row.loss < row.high
    assert rows[1].above == rows[1].above_width == 0
    size = net.config.num_hidden_layers * 2 * net.config.num_key_value_heads * 8 * 4
    assert [r.bytes_per_token for r in rows[:3]] == [0, size, size * 6 / CHUNK]
    for row in rows[6:9]:  # nothing was dropped
        assert row.above == pytest.approx(0, abs=1e-4)
    assert rows[2].above != 0
    assert all(row.seconds > 0 for row in rows)


def test_documents_have_to_fit(model: Models) -> None:
    for documents in ([tokens(20)[0].tolist()] * 2, [tokens(CHUNK + FOLLOW)[0].tolist()]):
        with pytest.raises(InputError, match="two documents"):
            measure(model("llama_gqa"), None, documents, chunk=CHUNK, follow=FOLLOW, budgets=[4])


def test_pieces_are_spread_over_a_text() -> None:
    assert list(cut(range(10), 4, 2)) == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert list(cut(range(10), 4, 5)) == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert list(cut(range(10), 4, 1)) == [[0, 1, 2, 3]]
    assert list(cut(range(3), 4, 5)) == []


def test_a_plot_is_a_picture() -> None:
    picture = ET.fromstring(lines("t", "x", "y", {"a": [(16, 3.0), (32, 2.5)], "b": [(16, 2.9)]}, {"full": 2.0}))
    texts = [e.text for e in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"t", "x", "y", "a", "b", "full", "16", "32"} <= set(texts)
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 3
